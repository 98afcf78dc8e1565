"""Section 8: where memory runs out, micro-batches shrink and the batch stays."""

import gc
import weakref
from types import SimpleNamespace
from unittest.mock import MagicMock

import peft
import pytest
import torch
from transformers import TrainerCallback

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB."
NO_MEMORY = [
    torch.OutOfMemoryError(MESSAGE),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
]


@pytest.fixture
def config(tiny_config):
    """Two epochs of 10 steps of 16 texts, without dropout."""
    changes = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2.0,
    }
    return tiny_config.model_copy(update=changes)


@pytest.fixture
def train(notebook, names, head, tokenizer, tokenized, tmp_path):
    """A function that trains as section 8 does, and returns the adapter."""

    def run(config, folder, *callbacks):
        trainer = notebook.within_memory(
            notebook.train_qlora,
            config,
            names,
            head,
            tokenizer,
            tokenized,
            tmp_path / folder,
            callbacks,
        )
        weights = peft.get_peft_model_state_dict(trainer.model)
        return torch.cat([weights[name].flatten() for name in sorted(weights)])

    return run


class RunOut(TrainerCallback):
    """Run out of memory at a step, for a size of micro-batch; note what is tried."""

    def __init__(self, step_of_size):
        self.step_of_size = step_of_size
        self.attempts = []  # micro-batch, accumulation, first step
        self.models = []
        self.left_over = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        gc.collect()
        self.left_over += sum(each() is not None for each in self.models)
        self.models.append(weakref.ref(model))
        size = args.per_device_train_batch_size
        accumulation = args.gradient_accumulation_steps
        self.attempts.append((size, accumulation, state.global_step))

    def on_step_begin(self, args, state, control, **kwargs):
        step = self.step_of_size.get(args.per_device_train_batch_size)
        if state.global_step == step:
            raise torch.OutOfMemoryError(MESSAGE)


def test_training_goes_on_from_the_last_checkpoint_with_the_same_batch(train, config):
    """It runs out in the first epoch, and again in the second."""
    run_out = RunOut({16: 3, 8: 15})
    adapter = train(config, "run", run_out)
    assert run_out.attempts == [(16, 1, 0), (8, 2, 0), (4, 4, 10)]
    whole = train(config, "whole")
    assert (adapter - whole).abs().max() < 2e-4


def test_an_attempt_that_ran_out_holds_no_memory_any_more(train, config):
    run_out = RunOut({16: 3, 8: 3})
    train(config, "run", run_out)
    assert len(run_out.attempts) == 3
    assert run_out.left_over == 0


def test_in_validation_its_batches_shrink(train, config, notebook, monkeypatch):
    predict = notebook.Trainer.prediction_step
    sizes = []

    def prediction_step(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["labels"]))
        if self.state.global_step == 20 and sizes[-1] > 8:
            raise torch.OutOfMemoryError(MESSAGE)
        return predict(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(notebook.Trainer, "prediction_step", prediction_step)
    run_out = RunOut({})
    train(config, "run", run_out)
    assert run_out.attempts[-1] == (2, 8, 10)  # from the last checkpoint on
    assert sizes[-3:] == [8, 8, 4]  # the 20 texts


@pytest.fixture
def attempts(notebook, config, monkeypatch):
    """A function: which micro-batches are tried until which error is raised?"""

    def run(error, raised, n_processes=1):
        state = SimpleNamespace(num_processes=n_processes)
        monkeypatch.setattr(notebook, "PartialState", lambda: state)
        attempt = MagicMock(side_effect=error)
        batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
        first = config.model_copy(update=batch)
        with pytest.raises(raised) as caught:
            notebook.within_memory(attempt, first)
        tried = []
        for call in attempt.call_args_list:
            used = call.args[0]
            size = used.per_device_train_batch_size
            tried.append((size, used.gradient_accumulation_steps))
        return tried, str(caught.value)

    return run


@pytest.mark.parametrize("error", NO_MEMORY)
def test_what_never_fits_is_said_with_what_to_do(attempts, error):
    tried, said = attempts(error, raised=MemoryError)
    assert tried == [(4, 3), (3, 4), (2, 6), (1, 12)]  # the same batch of 12
    assert "32 tokens" in said
    assert "lean" in said


def test_an_error_of_another_kind_is_not_taken_for_memory(attempts):
    tried, said = attempts(RuntimeError("a bug"), raised=RuntimeError)
    assert tried == [(4, 3)]
    assert said == "a bug"


def test_of_several_processes_none_goes_on_by_itself(attempts):
    """The others would wait for its gradients."""
    error = torch.OutOfMemoryError(MESSAGE)
    tried, said = attempts(error, raised=torch.OutOfMemoryError, n_processes=2)
    assert tried == [(4, 3)]
    assert said == MESSAGE
