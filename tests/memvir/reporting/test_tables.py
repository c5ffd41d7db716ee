import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from memvir.errors import NotMade, UserError
from memvir.params import parse_params
from memvir.reporting import aggregation, formats, page, results, tables
from memvir.reporting.results import Line
from memvir.reporting.space import draw_space
from tests import tiny

LINES = [
    Line("softmax", "Norm-SoftMax", "Norm-SoftMax", None),
    Line("memvir", "MemVir + Norm-SoftMax", "MemVir + Norm-SoftMax", "softmax"),
]


def values(runs: dict[str, list[float]], metrics=("recall_at_1", "recall_at_2", "rp", "map")) -> pd.DataFrame:
    rows = [
        (protocol, metric, variant, seed, value)
        for protocol in ("last", "best")
        for metric in metrics
        for variant, numbers in runs.items()
        for seed, value in enumerate(numbers, start=1)
    ]
    return pd.DataFrame(rows, columns=["protocol", "metric", "variant", "seed", "value"])


RUNS = {"softmax": [83.1, 83.5, 82.9], "memvir": [84.0, 83.7, 85.1]}


def published_as_values() -> tuple[pd.DataFrame, list[Line], pd.DataFrame]:
    published = tables.published_runs()
    rows = [
        ("best", row["metric"], row["loss"], seed, row[f"run{seed}"])
        for _, row in published.iterrows()
        for seed in range(1, 6)
    ]
    losses = published["loss"].unique()
    lines = [Line(x, x, x, x.removeprefix("MemVir + ") if x.startswith("MemVir") else None) for x in losses]
    return pd.DataFrame(rows, columns=["protocol", "metric", "variant", "seed", "value"]), lines, published


def test_our_aggregation_of_the_published_runs_gives_the_published_rows_digit_for_digit():
    runs, lines, published = published_as_values()
    summary = aggregation.summarise(runs, lines)
    text = pd.read_csv(
        str(tables.files("memvir.reporting") / "published_cars196_runs.csv"), dtype=str, keep_default_na=False
    )
    assert len(text) == 12
    for metric in published["metric"].unique():
        ours = tables.metric_table(summary, lines, metric, "best").rows
        theirs = text[text["metric"] == metric].drop(columns="metric").values.tolist()
        reordered = [[*row[:7], row[7] or tables.NOTHING, row[8]] for row in theirs]  # mean, diff, std
        assert ours == reordered


def test_a_difference_of_printed_means_would_not_give_the_published_one():
    runs, lines, _ = published_as_values()
    row = aggregation.summarise(runs, lines).loc["Recall@1", "best", "MemVir + Proxy-NCA"]
    assert f"{row['diff']:+.2f}" == "+2.71"
    assert f"{round(86.19 - 83.49, 2):+.2f}" == "+2.70"


def test_mean_std_and_diff_agree_with_the_formulas_written_out():
    random = np.random.default_rng(0)
    for _ in range(20):
        n = int(random.integers(2, 8))
        runs = {"softmax": random.normal(80, 2, n).tolist(), "memvir": random.normal(81, 1, n).tolist()}
        row = aggregation.summarise(values(runs), LINES).loc["rp", "last", "memvir"]
        mean = sum(runs["memvir"]) / n
        assert row["mean"] == pytest.approx(mean, rel=1e-12)
        assert row["std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in runs["memvir"]) / (n - 1)))
        assert row["diff"] == pytest.approx(mean - sum(runs["softmax"]) / n)


def test_the_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(1).normal(1, 2, 5)
    mean, half = aggregation.confidence_of_mean(values.tolist())
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert [mean - half, mean + half] == pytest.approx(list(expected))
    assert np.isnan(aggregation.confidence_of_mean([3.0])[1])


def test_interval_and_p_are_those_of_scipys_welch_test():
    random = np.random.default_rng(1)
    for _ in range(20):
        ours = random.normal(1, 2, int(random.integers(2, 9)))
        base = random.normal(0, 1, int(random.integers(2, 9)))
        difference, low, high, p = aggregation.welch(ours.tolist(), base.tolist())
        expected = stats.ttest_ind(ours, base, equal_var=False)
        interval = expected.confidence_interval(0.95)
        assert difference == pytest.approx(ours.mean() - base.mean())
        assert (low, high, p) == pytest.approx((interval.low, interval.high, expected.pvalue), rel=1e-6)


def test_one_run_or_runs_that_do_not_vary_have_a_difference_but_no_interval():
    for ours, base in (([84.0], [83.0, 82.0]), ([84.0, 84.0], [83.0, 83.0])):
        difference, *rest = aggregation.welch(ours, base)
        assert difference > 0
        assert all(math.isnan(x) for x in rest)


def test_a_single_seed_has_no_std():
    summary = aggregation.summarise(values({"softmax": [83.1], "memvir": [84.0]}), LINES)
    rows = tables.metric_table(summary, LINES, "map", "last").rows
    assert rows[1] == ["MemVir + Norm-SoftMax", "84.00", "84.00", "+0.90", tables.NOTHING]
    assert aggregation.to_metrics(summary)["memvir"]["map"] == {"mean": 84.0, "diff": 0.9}


def test_a_missing_run_is_shown_and_what_rests_on_the_others_is_marked():
    summary = aggregation.summarise(values({"softmax": [83.0, math.nan, 82.0], "memvir": [84.0, 84.0, 85.0]}), LINES)
    table = tables.metric_table(summary, LINES, "rp", "last")
    assert table.rows[0] == ["Norm-SoftMax", "83.00", "missing", "82.00", "82.50*", "–", "0.71*"]
    assert table.rows[1][4:] == ["84.33", "+1.83*", "0.58"]
    assert table.notes == ["* Not over all runs. Norm-SoftMax: 2 of 3 runs, without seed 2."]
    comparison = tables.comparison_table(summary, LINES)
    assert comparison.rows[0][3] == "+1.83*"


def test_metrics_leave_out_what_would_rest_on_a_part_of_the_runs():
    summary = aggregation.summarise(values({"softmax": [83.0, math.nan], "memvir": [84.0, 84.5]}), LINES)
    metrics = aggregation.to_metrics(summary)
    assert "softmax" not in metrics
    assert metrics["memvir"]["rp"] == {"mean": 84.25, "std": 0.35}


def test_a_variant_without_any_run_does_not_stop_the_others():
    summary = aggregation.summarise(values({"softmax": [math.nan, math.nan], "memvir": [84.0, 84.5]}), LINES)
    rows = tables.metric_table(summary, LINES, "rp", "last").rows
    assert rows[0] == ["Norm-SoftMax", "missing", "missing", "–", "–", "–"]
    assert rows[1][3:] == ["84.25", "–", "0.35"]
    assert "cannot be compared" in tables.verdicts(summary, LINES)[0]


def test_metrics_are_percentages_with_two_decimals_and_a_diff_only_where_there_is_a_baseline():
    metrics = aggregation.to_metrics(aggregation.summarise(values(RUNS), LINES))
    assert metrics["softmax"]["recall_at_1"] == {"mean": 83.17, "std": 0.31}
    assert metrics["memvir"]["recall_at_1"] == {"mean": 84.27, "std": 0.74, "diff": 1.1}
    assert list(metrics["memvir"]) == ["recall_at_1", "rp", "map"]


def test_the_verdict_follows_the_interval():
    for ours, word in (([90.0, 90.1, 90.2], "higher"), ([70.0, 70.1, 70.2], "lower"), (RUNS["softmax"], "no clear")):
        summary = aggregation.summarise(values({"softmax": RUNS["softmax"], "memvir": ours}), LINES)
        assert f"({word}" in tables.verdicts(summary, LINES)[0]


def test_a_rounded_zero_has_no_minus():
    summary = aggregation.summarise(values({"softmax": [80.001, 80.001], "memvir": [80.0, 80.0]}), LINES)
    assert tables.metric_table(summary, LINES, "rp", "last").rows[1][-2] == "+0.00"
    assert str(aggregation.to_metrics(summary)["memvir"]["rp"]["diff"]) == "0.0"


def test_every_recall_has_a_column_of_its_own_in_the_second_table():
    table = tables.all_metrics_table(aggregation.summarise(values(RUNS), LINES), LINES, "last")
    assert table.columns == ["Loss", "Recall@1", "Recall@2", "RP", "MAP"]
    assert table.rows[0][1] == "83.17 ± 0.31"


def test_published_values_stand_beside_ours_on_cars196_and_nowhere_else():
    summary = aggregation.summarise(values(RUNS), LINES)
    table = tables.published_table(summary, LINES, "cars196")
    assert table.rows[0] == ["Recall@1", "Norm-SoftMax", "83.22 ± 0.12", "83.17", "-0.05", "83.17", "-0.05"]
    assert [row[0] for row in table.rows] == ["Recall@1"] * 2 + ["RP"] * 2 + ["MAP"] * 2
    assert tables.published_table(summary, LINES, "glyphs") is None
    sop = tables.published_table(summary, LINES, "sop")  # only in the paper's table 4, with one decimal
    assert sop.rows[0][2] == "78.6"
    assert len(sop.rows) == 2


def test_the_published_values_of_proxy_synthesis_say_which_runs_the_plain_losses_had():
    lines = [*LINES, Line("synthesis", "Proxy Synthesis + Norm-SoftMax", "Proxy Synthesis + Norm-SoftMax", "softmax")]
    summary = aggregation.summarise(values({**RUNS, "synthesis": [84.0, 84.5, 84.4]}), lines)
    table = tables.published_table(summary, lines, "cars196")
    published = {row[0]: row[2] for row in table.rows if row[1].startswith("Proxy Synthesis")}
    assert published == {"Recall@1": "84.25 ± 0.31", "RP": "36.76", "MAP": "26.51"}
    assert tables.TWO_SAMPLES in table.notes


def test_the_five_published_runs_of_the_plain_losses_are_the_best_of_the_eight():
    five, eight = (tables.published_runs(number).set_index(["metric", "loss"]) for number in (5, 8))
    for key, row in eight.iterrows():
        runs = sorted(row[[f"run{number}" for number in range(1, 9)]].dropna(), reverse=True)
        if runs:
            assert runs[:5] == five.loc[key, [f"run{number}" for number in range(1, 6)]].tolist()
        if runs and key[0] == "Recall@1":
            assert round(np.mean(runs), 2) == row["mean"]
            assert f"{row['mean']:.2f} ({key[1]})" in tables.TWO_SAMPLES


@pytest.mark.parametrize("dataset", ["loss", "metric", "mean"])
def test_a_data_set_called_like_a_column_of_the_published_tables_has_no_published_values(dataset):
    assert tables.published_means(dataset) == {}


def test_markdown_escapes_what_would_be_markup():
    text = formats.to_markdown(tables.Table("", ["Loss", "1"], [["a|b", "1.00*"]], ["* a note"]))
    assert r"a\|b" in text
    assert r"1.00\*" in text
    assert "\n\\* a note\n" in text


def test_latex_is_a_booktabs_table_with_specials_escaped():
    table = tables.Table("Recall@1 (%)", ["A_b", "1 ± 2"], [["x & y", "-0.50"]], ["50 % of $5"])
    text = formats.to_latex(table, "tab:x")
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\caption{Recall@1 (\%). 50 \% of \$5}" in text
    assert r"A\_b" in text
    assert r"x \& y" in text
    assert r"$\pm$" in text
    assert "$-$0.50" in text


def test_csv_holds_every_number_of_every_metric():
    text = formats.to_csv(aggregation.summarise(values(RUNS), LINES), LINES)
    header, *rows = text.splitlines()
    assert header == "metric,protocol,variant,loss,1,2,3,count,mean,std,base_count,diff,low,high,p"
    assert len(rows) == 16
    assert rows[0] == "recall_at_1,last,softmax,Norm-SoftMax,83.1000,83.5000,82.9000,3,83.1667,0.3055,,,,,"


def test_documents_are_the_same_bytes_every_time():
    def documents() -> tuple[str, ...]:
        summary = aggregation.summarise(values(RUNS), LINES)
        checks = [results.Check(True, "fine")]
        return (
            formats.to_document(aggregation.Experiment(LINES, {}, summary, checks), "cars196"),
            formats.to_latex_document(summary, LINES, "cars196"),
            formats.to_csv(summary, LINES),
        )

    assert documents() == documents()


# ------------------------------------------------------------------------------------------------- reading results


SETTINGS = {"loss": {"scale": 23.0}}


def write_result(path, **changes) -> None:
    content = {
        "last": {"recall_at_1": 0.5, "rp": 0.25, "map": 0.2},
        "best": {"recall_at_1": 0.75, "rp": 0.25, "map": 0.2},
        "last_epoch": 6,
        "settings": SETTINGS,
        "made_by": {"training": {"environment": {"torch": "2.14.1"}}},
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_results_become_percentages_and_a_missing_file_a_missing_value(tmp_path):
    write_result(tmp_path / "norm_softmax" / "1.json")
    paths = {("norm_softmax", seed): tmp_path / "norm_softmax" / f"{seed}.json" for seed in (1, 2)}
    frame = results.run_values(results.read_results(paths), [Line("norm_softmax", "x", "x", None)], [1, 2])
    chosen = frame[(frame["metric"] == "recall_at_1") & (frame["protocol"] == "best")]
    assert chosen["value"].tolist() == pytest.approx([75.0, math.nan], nan_ok=True)


def test_no_result_at_all_and_a_broken_file_are_errors_that_name_the_place(tmp_path):
    paths = {("norm_softmax", 1): tmp_path / "norm_softmax" / "1.json"}
    with pytest.raises(UserError, match="none of the 1 runs has a result"):
        results.read_results(paths)
    paths["norm_softmax", 1].parent.mkdir()
    for content in ('{"last": {}', '{"last": {}}', "[]", '{"last": 1, "best": 2}'):
        paths["norm_softmax", 1].write_text(content)
        with pytest.raises(UserError, match=r"1\.json: not a result file"):
            results.read_results(paths)


def test_checks_find_missing_runs_mixed_settings_lengths_and_environments(tmp_path):
    lines = [Line("a", "A", "A", None, origin="tuned"), Line("b", "B", "B", "a", origin="tuned")]
    paths = {(v, s): tmp_path / v / f"{s}.json" for v in "ab" for s in (1, 2)}
    for path in paths.values():
        write_result(path)
    assert all(check.passed for check in results.check_runs(results.read_results(paths), lines, [1, 2]))
    paths["a", 2].unlink()
    write_result(paths["b", 1], last_epoch=9, made_by={"training": {"environment": {"torch": "2.6.0"}}})
    write_result(paths["b", 2], settings={"loss": {"scale": 9.0}})
    failed = [
        check.text for check in results.check_runs(results.read_results(paths), lines, [1, 2]) if not check.passed
    ]
    assert failed == [
        "1 of 4 runs missing: a/2.",
        "The seeds of b were run with different settings.",
        "Runs differ in length, from 6 to 9 epochs, which a difference may be due to.",
        "Not all runs were made alike; they differ in torch (2.14.1, 2.6.0).",
    ]


def test_results_of_other_settings_are_left_out_and_named(tmp_path):
    recipe, variants = parse_params(tiny.params()).recipe("tiny"), ["norm_softmax", "memvir_norm_softmax"]
    result_file = lambda variant, seed: tmp_path / variant / f"{seed}.json"  # noqa: E731
    for variant in variants:
        for seed in (1, 2):
            write_result(result_file(variant, seed), settings={"loss": {"scale": 9.0}} if seed == 2 else SETTINGS)
    experiment = aggregation.read_experiment(recipe, variants, [1, 2], result_file, lambda v: SETTINGS)
    missing, left_out = (check.text for check in experiment.checks[:2])
    runs = "norm_softmax/2, memvir_norm_softmax/2"
    assert missing == f"2 of 4 runs missing: {runs}."
    assert left_out == f"Left out, as they were run with other settings than params.yaml has now: {runs}."
    assert tables.metric_table(experiment.summary, experiment.lines, "map", "last").rows[0][1:3] == ["20.00", "missing"]
    with pytest.raises(NotMade, match="all results are of other settings than params"):
        aggregation.read_experiment(recipe, variants, [1, 2], result_file, lambda v: {})


def test_what_is_not_known_of_a_run_is_no_difference(tmp_path):
    lines, paths = [Line("a", "A", "A", None)], {("a", seed): tmp_path / f"{seed}.json" for seed in (1, 2)}
    write_result(paths["a", 1])
    write_result(paths["a", 2], made_by={"training": {}})
    texts = [check.text for check in results.check_runs(results.read_results(paths), lines, [1, 2])]
    assert texts[-1] == "What trained a/2 is not on record." and not any("Not all runs" in text for text in texts)


def test_a_memvir_run_without_any_virtual_class_is_marked_in_every_table(tmp_path):
    recipe = parse_params(tiny.params()).recipe("tiny")
    variants = ["norm_softmax", "memvir_norm_softmax"]
    most = {("norm_softmax", 1): 0, ("norm_softmax", 2): 0, ("memvir_norm_softmax", 1): 12}
    settings_of = lambda variant: {"memvir": {"num_steps": 2}} if variant.startswith("memvir") else {}  # noqa: E731
    for variant in variants:
        for seed in (1, 2):
            changes = {"settings": settings_of(variant), "most_virtual_classes": most.get((variant, seed), 0)}
            write_result(tmp_path / variant / f"{seed}.json", **changes)

    experiment = aggregation.read_experiment(
        recipe, variants, [1, 2], lambda v, s: tmp_path / v / f"{s}.json", settings_of
    )
    summary, lines = experiment.summary, experiment.lines
    assert [line.title for line in lines] == ["Norm-SoftMax", "MemVir + Norm-SoftMax†"]
    note = "† Not MemVir: nothing virtual was ever in use in MemVir + Norm-SoftMax, seed 2."
    shown = [
        tables.metric_table(summary, lines, "map", "last"),
        tables.all_metrics_table(summary, lines, "last"),
        tables.comparison_table(summary, lines),
        tables.published_table(summary, lines, "cars196"),
    ]
    for table in shown:
        assert note in table.notes and any("MemVir + Norm-SoftMax†" in row for row in table.rows)
    assert "MemVir + Norm-SoftMax† against Norm-SoftMax" in tables.verdicts(summary, lines)[0]
    assert r"$\dagger$" in formats.to_latex(shown[0], "tab:x") and "†" not in formats.to_latex(shown[0], "tab:x")
    _, failed = [check.text for check in experiment.checks if not check.passed]
    assert failed == ("Nothing virtual was ever in use in memvir_norm_softmax/2: there the plain loss was trained.")
    assert failed in formats.to_terminal(experiment)
    assert failed in page.render_page("tiny", experiment, [], None)


def test_a_wrapper_with_embeddings_alone_in_use_is_not_marked(tmp_path):
    settings, line = {"broadface": {"queue_size": 9}}, Line("b", "BroadFace + X", "BroadFace + X", None)
    for most, title in ((9, "BroadFace + X"), (0, "BroadFace + X†")):
        changes = {"most_virtual_classes": 0, "most_virtual_embeddings": most}
        write_result(tmp_path / "b" / "1.json", settings=settings, **changes)
        (marked,) = results.mark_plain([line], results.read_results({("b", 1): tmp_path / "b" / "1.json"}))
        assert marked.title == title


def test_results_that_do_not_tell_how_many_virtual_classes_were_in_use_are_not_marked(tmp_path):
    path = tmp_path / "memvir_norm_softmax" / "1.json"
    write_result(path, settings={"memvir": {"num_steps": 2}})
    line = Line("memvir_norm_softmax", "MemVir", "MemVir", None)
    found = results.read_results({("memvir_norm_softmax", 1): path})
    assert results.mark_plain([line], found) == [line]


def test_variants_that_share_a_name_are_told_apart_by_n_and_m_and_then_by_their_own_name():
    raw = tiny.params()
    variants = raw["tiny"]["variants"]
    other = {**variants["memvir_norm_softmax"], "memvir": {"num_steps": 3, "step_gap": 1, "warm_up_epochs": 1}}
    variants |= {"more": other, "again": other, "plain": variants["norm_softmax"]}
    recipe = parse_params(raw).recipe("tiny")
    lines = results.table_lines(recipe, ["norm_softmax", "memvir_norm_softmax"])
    assert [line.title for line in lines] == ["Norm-SoftMax", "MemVir + Norm-SoftMax"]
    assert [line.baseline for line in lines] == [None, "norm_softmax"]
    lines = results.table_lines(recipe, ["norm_softmax", "plain", "memvir_norm_softmax", "more", "again"])
    assert [line.title for line in lines] == [
        "Norm-SoftMax [norm_softmax]",
        "Norm-SoftMax [plain]",
        "MemVir + Norm-SoftMax (2, 1)",
        "MemVir + Norm-SoftMax (3, 1) [more]",
        "MemVir + Norm-SoftMax (3, 1) [again]",
    ]
    assert {line.loss for line in lines} == {"Norm-SoftMax", "MemVir + Norm-SoftMax"}


def test_variants_of_another_wrapper_are_told_apart_by_its_numbers():
    raw = tiny.params()
    loss = {"name": "Norm-SoftMax", "scale": 23.0}
    raw["tiny"]["variants"] |= {f"queue_{size}": {"loss": loss, "broadface": {"queue_size": size}} for size in (9, 99)}
    raw["tiny"]["variants"] |= {name: {"loss": loss, "virtual_softmax": {}} for name in ("one", "two")}
    raw["tiny"]["variants"] |= {f"mu_{10 * mu:.0f}": {"loss": loss, "proxy_synthesis": {"mu": mu}} for mu in (1, 0.5)}
    lines = results.table_lines(parse_params(raw).recipe("tiny"), list(raw["tiny"]["variants"])[2:])
    assert [line.title.partition(" + Norm-SoftMax")[::2] for line in lines] == [
        ("BroadFace", " (9)"),
        ("BroadFace", " (99)"),
        ("Virtual Softmax", " [one]"),
        ("Virtual Softmax", " [two]"),
        ("Proxy Synthesis", " (0.4, 1)"),
        ("Proxy Synthesis", " (0.4, 0.5)"),
    ]
    assert {line.baseline for line in lines} == {"norm_softmax"}


def test_memvir_is_compared_with_its_baseline_and_with_its_control():
    content = tiny.params()
    variants = content["tiny"]["variants"]
    variants["control_norm_softmax"] = {"control_of": "memvir_norm_softmax"}
    lines = results.table_lines(parse_params(content).recipe("tiny"), list(variants))
    assert [(a.title, b.title) for a, b in results.comparisons(lines)] == [
        ("MemVir + Norm-SoftMax", "Norm-SoftMax"),
        ("MemVir + Norm-SoftMax", "Norm-SoftMax (control of MemVir)"),
        ("Norm-SoftMax (control of MemVir)", "Norm-SoftMax"),
    ]
    runs = {"norm_softmax": [80.0, 81.0], "memvir_norm_softmax": [86.0, 87.0], "control_norm_softmax": [84.0, 85.0]}
    summary = aggregation.summarise(values(runs), lines)
    differences = [row[3] for row in tables.comparison_table(summary, lines).rows[:3]]
    assert differences == ["+6.00", "+2.00", "+4.00"]
    assert tables.CONTROL in tables.metric_table(summary, lines, "map", "last").notes


@pytest.mark.parametrize(
    ("origins", "passed", "said"),
    [
        (["tuned", "tuned"], True, "Tuned on both sides"),
        (["published", "published"], True, "published"),
        (
            ["untuned", "untuned"],
            False,
            "An untuned comparison: no equal search was made for the settings of all",
        ),
        (["tuned", "untuned"], False, "tuned: A; untuned: B"),
    ],
)
def test_a_table_says_whether_both_sides_were_tuned_alike(origins, passed, said):
    lines = [Line(name, name, name, None, origin=origin) for name, origin in zip("AB", origins, strict=True)]
    runs = {(name, seed): {"last": {}, "best": {}, "last_epoch": 1} for name in "AB" for seed in (1, 2)}
    (check,) = [check for check in results.check_runs(runs, lines, [1, 2]) if said in check.text]
    assert check.passed == passed


def test_the_untrained_backbone_is_the_first_line_and_seen_classes_have_a_table(tmp_path):
    recipe = parse_params(tiny.params()).recipe("tiny")
    variants = ["norm_softmax", "memvir_norm_softmax"]
    for shift, variant in enumerate(variants):
        for seed in (1, 2):
            space = {"train_recall_at_1": 0.9 + 0.01 * seed, "train_map": 0.8, "distance_ratio": 0.5 + 0.1 * shift}
            last = {"recall_at_1": 0.7, "map": 0.6 + 0.01 * seed}
            untrained = {"recall_at_1": 0.1 * seed, "map": 0.05}
            path = tmp_path / variant / f"{seed}.json"
            write_result(path, last=last, best=last, space=space, untrained=untrained)
    experiment = aggregation.read_experiment(
        recipe, variants, [1, 2], lambda v, s: tmp_path / v / f"{s}.json", lambda v: SETTINGS
    )
    table = tables.metric_table(experiment.summary, experiment.lines, "recall_at_1", "last")
    assert table.rows[0] == ["Untrained", "10.00", "20.00", "15.00", "–", "7.07"]
    assert len(table.rows) == 3 and all(check.text.startswith("All 4 runs") for check in experiment.checks[:1])
    space = tables.space_table(experiment.space, experiment.lines)
    rows = {row[0]: dict(zip(space.columns, row, strict=True)) for row in space.rows[:2]}
    assert rows["Norm-SoftMax"]["Recall@1, seen (%)"] == "91.50 ± 0.71"
    assert rows["Norm-SoftMax"]["ratio"] == "0.500 ± 0.000"
    assert space.rows[0][3] == "21.50 ± 0.71" and space.rows[0][5] == "18.50 ± 0.71"  # the gaps
    assert space.rows[2][:2] == ["MemVir + Norm-SoftMax", "Norm-SoftMax"]
    assert space.rows[2][2].startswith("+0.00 [-")
    draw_space(experiment.space, experiment.summary, experiment.lines, tmp_path / "space")
    assert (tmp_path / "space.png").stat().st_size > 5000
    assert "## Seen and unseen classes" in formats.to_document(experiment, "tiny")
