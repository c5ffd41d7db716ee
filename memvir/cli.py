"""memvir: put a trained model to use. MODEL is a model file, the folder of a run, or an address with --sha256."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memvir import __version__, libraries
from memvir.commands import Parser, one_line_errors
from memvir.errors import UserError
from memvir.files import extendable, write_json, write_text

if TYPE_CHECKING:
    from memvir.trained import TrainedModel
    from memvir.trained.folder import Embeddings

log = logging.getLogger("memvir")

TOP = 10
RECALL_AT = (1, 2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `memvir`. What a user can put right ends in one line and exit code 1."""
    options = _parser().parse_args(arguments)
    libraries.prepare()  # so that embeddings are those of the evaluation; and counting cores imports NumPy
    libraries.prepare(libraries.available_cores())
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("memvir").setLevel(logging.INFO)
    try:
        with one_line_errors():
            options.command(options)
    except KeyboardInterrupt:
        print(f"interrupted; {options.interrupted}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of a folder's pictures, and their names, as an .npz."""
    from memvir.trained.folder import write_embeddings

    out = _target(options, "out", ".npz")
    model = _load(options)
    part = out.with_name(f".{extendable(out.name)}.rows")  # not .part, which is what atomic_write makes
    part.parent.mkdir(parents=True, exist_ok=True)
    embeddings = _embed_folder(options, model, options.folder, batch_size=options.batch_size, part=part)
    write_embeddings(out, embeddings, model)
    part.unlink()
    print(f"{out}: {_count(len(embeddings.names))}, embeddings of {model.dim} dimensions")


def search(options: argparse.Namespace) -> None:
    """Find the pictures of a folder that are most like a picture, or like each one of another folder."""
    from memvir.trained.folder import folder_state, pictures_in, read_embeddings
    from memvir.trained.page import Found, Query, legible, render_page

    page = _target(options, "page", ".html") if options.page is not None else None
    if options.embeddings is None:
        _check_top(options, len(pictures_in(options.folder)[0]))  # before the work of embedding them
    model = _load(options)
    if options.query.is_dir():
        asked = _embed_folder(options, model, options.query)
        queries, query_embeddings = [options.query / name for name in asked.names], asked.values
    else:
        queries, query_embeddings = [options.query], model.embed(options.query, device=options.device)
    if options.embeddings is None:
        gallery = _embed_folder(options, model, options.folder)
    else:
        gallery = read_embeddings(options.embeddings, model)
        missing = [name for name in gallery.names if not (options.folder / name).is_file()]
        if missing:
            raise UserError(
                f"{options.embeddings}: of its {_count(len(gallery.names))}, {options.folder} lacks {len(missing)} "
                f"({legible(missing[0])}); give the folder that it was made of, or run `memvir embed` again"
            )
        if gallery.state not in ("", folder_state(options.folder, pictures_in(options.folder)[0])):
            log.warning(
                "%s: pictures of %s have changed since; run `memvir embed` again", options.embeddings, options.folder
            )
    pictures = len(gallery.names)
    _check_top(options, pictures)  # those that could be read
    top = options.top or min(TOP, pictures)
    # one more, in case that the query lies in the folder itself
    similarities, places = model.search(query_embeddings, gallery.values, min(top + 1, pictures))
    answers = []
    for query, row, indices in zip(queries, similarities.tolist(), places.tolist(), strict=True):
        found = [
            Found(options.folder / gallery.names[index], gallery.names[index], similarity)
            for similarity, index in zip(row, indices, strict=True)
        ]
        place = query.resolve()  # rather than the file: a folder may hold several links to it
        itself = next((item for item in found if item.path.resolve() == place), None)
        answers.append(Query(query, [item for item in found if item is not itself][:top]))
    for answer in answers:
        print(answer.shown_name)
        for rank, item in enumerate(answer.found, 1):
            print(f"{rank:6d}  {item.shown_similarity:>6}  {item.shown_name}")
    if page is not None:
        write_text(page, render_page(answers, model.name, options.folder, pictures))
        print(f"{legible(str(page))}: the same with the pictures")


def _check_top(options: argparse.Namespace, pictures: int) -> None:
    if options.top and options.top > pictures:
        raise UserError(
            f"--top: {options.top} is more than the {_count(pictures)} in {options.folder}; use --top {pictures}"
        )


def evaluate(options: argparse.Namespace) -> None:
    """Recall@k, RP and MAP over pictures in class folders: each picture a query against all others."""
    from memvir.retrieval import evaluate as measure
    from memvir.trained.card import metric_name
    from memvir.trained.folder import pictures_in

    out = _target(options, "out", ".json") if options.out is not None else None
    for name in pictures_in(options.folder)[0]:  # before the work of embedding them
        if "/" not in name:
            raise UserError(
                f"{options.folder / name}: lies in no class folder; the form is {options.folder}/CLASS/PICTURE"
            )
    model = _load(options)
    embeddings = _embed_folder(options, model, options.folder)
    classes = [name.rpartition("/")[0] for name in embeddings.names]
    recall_at = options.recall_at or [k for k in RECALL_AT if k < len(classes)]
    metrics = measure(embeddings.values, classes, recall_at)
    print(f"{model.name} on {_count(len(classes))} of {len(set(classes))} classes")
    for key, value in metrics.items():
        print(f"{metric_name(key):12} {100 * value:6.2f} %")
    if out is not None:  # last: what cannot be written has been said
        write_json(out, metrics)


def export(options: argparse.Namespace) -> None:
    """Write the network as ONNX, compared with torch first; its input is what `preprocessing` in the metadata says."""
    from memvir.trained.onnx import export_onnx

    path = _target(options, "onnx", ".onnx")
    model = _load(options)
    difference = export_onnx(model, path)
    print(f"{path}: as torch to {difference:.1e}, for any batch size")
    print(f"preprocessing: {json.dumps(model.metadata['preprocessing'])}")


# --- parsing ---


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="memvir", description=__doc__)
    parser.add_argument("--version", action="version", version=f"memvir {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    again = "nothing was written; run the same command again"

    command = _command(commands, "embed", embed, "run the same command again, it goes on where it stopped")
    _add_folder(command, "its pictures, in folders or not")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="`names` and `embeddings`")
    command.add_argument("--batch-size", type=_positive, default=256, help="pictures at a time (%(default)s)")

    command = _command(commands, "search", search, again)
    command.add_argument("query", type=Path, metavar="QUERY", help="a picture, or a folder of them")
    _add_folder(command, "the pictures to search; QUERY itself is left out if it is one of them")
    command.add_argument("--top", type=_positive, metavar="K", help=f"how many to find ({TOP})")
    command.add_argument("--page", type=Path, metavar="FILE.html", help="also write a page with the pictures")
    command.add_argument("--embeddings", type=Path, metavar="FILE.npz", help="FOLDER's, by `memvir embed`: saves time")

    command = _command(commands, "evaluate", evaluate, again)
    _add_folder(command, "pictures in class folders; a picture's class is the folder that it lies in")
    command.add_argument("--recall-at", type=_positive, nargs="+", metavar="K", help="the k of Recall@k (1 2 4 8)")
    command.add_argument("--out", type=Path, metavar="FILE.json", help="also write the metrics, from 0 to 1")

    command = _command(commands, "export", export, again)
    command.add_argument("--onnx", type=Path, required=True, metavar="FILE.onnx", help="the file to write")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, function: object, interrupted: str) -> Parser:
    text = (function.__doc__ or "").strip()
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function, interrupted=interrupted)
    parser.add_argument("model", metavar="MODEL", help="a model file, the folder of a run, or an http(s) address")
    parser.add_argument("--sha256", help="the model file's, or its start; needed for an address")
    return parser


def _add_folder(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the first GPU if there is one")
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="name and leave out pictures that cannot be read; without it they are named and nothing is written",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return number


_positive.__name__ = "number"  # what argparse calls it: invalid number value: 'x'


# --- what the commands share ---


def _load(options: argparse.Namespace) -> "TrainedModel":
    from memvir import load_model

    return load_model(options.model, options.sha256)


def _embed_folder(options: argparse.Namespace, model: "TrainedModel", folder: Path, **more: Any) -> "Embeddings":
    from memvir.trained.folder import UnreadablePictures, embed_folder

    skip = options.skip_unreadable
    try:
        return embed_folder(model, folder, skip_unreadable=skip, device=options.device, **more)
    except UnreadablePictures as error:
        raise UserError(str(error) + ("" if skip else ", or leave them out with --skip-unreadable")) from None


def _target(options: argparse.Namespace, option: str, suffix: str) -> Path:
    """The file that an option says to write: of that suffix, and none that the command reads."""
    path: Path = getattr(options, option)
    if path.suffix != suffix:
        raise UserError(
            f"--{option}: {path} does not end in {suffix}, which is what it becomes; call it {path}{suffix}"
        )
    for name in ("model", "query", "embeddings"):
        source = getattr(options, name, None)
        if source is not None and path.exists() and os.path.exists(source) and path.samefile(source):
            raise UserError(f"--{option}: {path} is the {name} itself; write to another file")
    return path


def _count(pictures: int) -> str:
    return f"{pictures:,} picture{'' if pictures == 1 else 's'}"
