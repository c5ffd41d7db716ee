import pytest
import torch

from memvir.errors import UserError
from memvir.experiment.environment import set_up_device
from memvir.experiment.gpu_errors import gpu_errors, memvir_bytes
from memvir.experiment.settings import Runtime
from memvir.memory import MemVir
from memvir.params import load_params
from tests.memvir.experiment.test_training import ROOT, make_trainer, tiny_params
from tests.stages.workspace import Workspace


@pytest.mark.parametrize("variant", ["memvir_norm_softmax", "memvir_proxy_anchor"])
def test_what_memvir_is_said_to_keep_is_what_it_keeps(variant):
    run = load_params(ROOT / "params.yaml").run("cars196", variant, 1)
    trainer = make_trainer_on_meta(run)
    assert isinstance(trainer.loss, MemVir)
    trainer.loss(torch.empty(128, 512, device="meta"), torch.zeros(128, dtype=torch.long, device="meta"))
    kept = sum(buffer.nbytes for buffer in trainer.loss.buffers())
    assert memvir_bytes(run, 98)[0] == pytest.approx(kept, rel=0.01)


def make_trainer_on_meta(run):
    run = run.model_copy(update={"model": run.model.model_copy(update={"pretrained": "none"})})
    return make_trainer(run, classes=98, per_class=2, device=torch.device("meta"))


def test_a_gpu_that_is_too_small_is_one_line_that_says_what_takes_memory_and_what_to_change():
    run = load_params(ROOT / "params.yaml").run("cars196", "memvir_norm_softmax", 1)
    with pytest.raises(UserError) as caught, gpu_errors(run, 98):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")
    assert str(caught.value) == (
        "cars196/memvir_norm_softmax/1: CUDA out of memory. Tried to allocate 2.00 GiB. The run has batches of 128 "
        "images of 224 pixels in fp32; MemVir with N 45, M 10, C 98, D 512 keeps 242 MB in float32 and computes 5 MB "
        "of logits a step. Use training.precision: bf16, or a larger share of the GPU (resources.gpus); run the "
        "same command again, it goes on from its last checkpoint"
    )


def test_a_gpu_that_is_gone_is_one_line_and_a_fault_of_the_code_is_not():
    run = tiny_params().run("tiny", "norm_softmax", 1)
    with (
        pytest.raises(
            UserError, match=r"^tiny/norm_softmax/1: the GPU failed \(CUDA error: unspecified launch failure\)"
        ),
        gpu_errors(run, 6),
    ):
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    for fault in ("CUDA error: device-side assert triggered", "shapes do not match"):
        with pytest.raises(RuntimeError, match=fault) as caught, gpu_errors(run, 6):
            raise RuntimeError(fault)
        assert not isinstance(caught.value, UserError)


def test_without_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        UserError, match=r"cuda asked for, but torch sees none .CUDA_VISIBLE_DEVICES hides all.; use auto"
    ):
        set_up_device(Runtime(device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_torch_says_of_the_driver_is_the_reason(monkeypatch):
    import warnings

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def too_old():
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found 1.2). Update it.", stacklevel=1
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    with pytest.raises(UserError, match=r"none \(The NVIDIA driver on your system is too old \(found 1\.2\)\)"):
        set_up_device(Runtime(device="cuda"))


def test_a_run_that_finds_no_room_ends_in_one_line_and_goes_on_later(tmp_path):
    workspace = Workspace(tmp_path / "project", epochs=4, check_epoch=4).prepared()

    def full_at_the_third_epoch() -> None:
        from memvir.experiment.training import Trainer

        really = Trainer.train_epoch

        def train_epoch(self, watch):
            if self.epoch == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
            return really(self, watch)

        Trainer.train_epoch = train_epoch

    outcome = workspace.train(before=full_at_the_third_epoch)
    assert outcome.code == 1 and "Traceback" not in outcome.output
    assert "tiny/memvir_norm_softmax/1: CUDA out of memory" in outcome.output.splitlines()[-1]
    assert workspace.train().code == 0
