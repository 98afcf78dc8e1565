"""Sections 4, 6, 7 and 9: which models fit; what is 4-bit, trained and merged."""

import importlib.util

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from test_families import SHAPE, make_family
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers import BertModel

NAMES = ["a", "b"]
TEXTS = [f"a film of {minutes} minutes" for minutes in range(20)]


def bert_config(**changes):
    """Return the configuration of a tiny BERT."""
    options = SHAPE.copy()
    options.update(changes)
    return BertConfig(**options)


@pytest.fixture
def save(tmp_path, tokenizer):
    """A function that saves a model with a tokenizer of 30,522 tokens."""

    def run(model):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return run


@pytest.fixture
def bert(save):
    """The folder of a tiny BERT."""
    return save(make_family("bert"))


@pytest.fixture
def configure(notebook, tmp_path):
    """A function that returns settings for a model in a folder, and their sources."""

    def run(folder, **changes):
        settings = {
            "preset": "full",
            "model_name": str(folder),
            "max_length": 32,
            "lora_r": 4,
            "lora_alpha": 8,
            "output_dir": str(tmp_path),
        }
        settings.update(changes)
        return notebook.resolve_config(settings, {}, cuda=False)

    return run


@pytest.fixture
def fit(notebook, configure):
    """A function that returns settings for a model, fitted to it."""

    def run(folder, **changes):
        config, sources = configure(folder, **changes)
        _, about = notebook.open_checkpoint(config)
        return notebook.fit_to_model(config, sources, about)

    return run


@pytest.fixture
def refusal(notebook, fit):
    """A function that returns what the refusal of a model says."""

    def run(folder, **changes):
        with pytest.raises(ValueError) as error:
            notebook.load_published(fit(folder, **changes), NAMES)
        assert str(error.traceback[-1].path).startswith("<code cell")
        return str(error.value)

    return run


def randomize(model, std=0.05):
    """Give trained parameters random values: at zero an adapter does nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)


@pytest.mark.parametrize("targets", ["all-linear", "dense", "attention.self.key"])
def test_an_own_choice_of_layers_is_kept(fit, bert, targets):
    assert fit(bert, target_modules=[targets]).target_modules == [targets]


def test_unknown_layers_are_refused_with_the_known_ones(refusal, bert):
    said = refusal(bert, target_modules="q_lin,query")
    assert "q_lin" in said
    for name in ("query", "key", "dense", "all-linear"):
        assert name in said.split("Allowed")[1]


def test_a_model_without_its_tokenizer_is_refused(refusal, bert):
    for path in bert.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refusal(bert)
    assert str(bert) in refusal(bert)


def test_weights_that_can_hold_a_program_are_refused(refusal, bert):
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    assert "model.safetensors" in refusal(bert)


def test_a_file_is_no_model(refusal, bert):
    assert "config.json" in refusal(bert / "config.json")


def test_an_adapter_is_no_base(refusal, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    assert "is an adapter. Name its base, or outputs/merged" in refusal(tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is not None,
    reason="sentencepiece is installed",
)
def test_a_sentencepiece_tokenizer_alone_names_what_to_install(refusal, save):
    folder = save(make_family("deberta-v2"))
    for path in folder.glob("tokenizer*"):
        path.rename(folder / "spm.model")
    assert "pip install sentencepiece" in refusal(folder)


@pytest.mark.parametrize("rows", [1000, 30521, 61046])
def test_a_tokenizer_of_another_vocabulary_is_refused(refusal, save, rows):
    said = refusal(save(BertModel(bert_config(vocab_size=rows))))
    assert "30,522" in said
    assert f"{rows:,}" in said


POSITIONS = [("bert", 130), ("roberta", 128), ("mpnet", 128)]


@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_a_model_reads_as_many_tokens_as_it_has_positions(
    notebook, fit, save, name, positions
):
    config = fit(save(make_family(name)), max_length=positions)
    assert config.max_length == positions
    model, _ = notebook.load_classifier(config, NAMES)
    assert model(torch.full((1, positions), 1000)).logits.isfinite().all()


@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_a_longer_max_length_of_the_user_is_refused(refusal, save, name, positions):
    said = refusal(save(make_family(name)), max_length=positions + 1)
    assert f"max_length={positions + 1}" in said
    assert str(positions) in said


def test_a_longer_max_length_of_a_preset_is_shortened_in_print(notebook, bert, capsys):
    settings = {"preset": "full,recommended", "model_name": str(bert)}
    config, sources = notebook.resolve_config(settings, {}, cuda=False)
    _, about = notebook.open_checkpoint(config)
    assert notebook.fit_to_model(config, sources, about).max_length == 130
    assert "max_length is 130, not 512" in capsys.readouterr().out


def test_a_checkpoint_without_weights_of_its_encoder_is_refused(refusal, bert):
    bert_config(num_hidden_layers=3).save_pretrained(bert)
    said = refusal(bert)
    assert "lacks weights of its encoder: bert.encoder.layer.2" in said


DAMAGE = [
    ("config.json", "{"),
    ("config.json", '{"model_type": "new"}'),
    ("tokenizer.json", "{"),
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
]


@pytest.mark.parametrize(("file", "content"), DAMAGE)
def test_a_damaged_model_is_refused_by_name(refusal, bert, file, content):
    damaged = bert.rename(bert.with_name("damaged"))
    (damaged / file).write_text(content)
    assert "damaged" in refusal(damaged)


def test_a_masked_language_model_gets_a_head_and_a_pooler_that_are_trained(
    notebook, fit, save
):
    config = fit(save(BertForMaskedLM(bert_config())))
    _, head = notebook.load_published(config, NAMES)
    assert head == ["classifier", "pooler"]
    model = notebook.build_qlora(config, NAMES, head)
    adapters = 2 * 2 * 4 * (64 + 64)  # layers, query and value, rank
    pooler = 64 * 64 + 64
    classifier = 64 * 2 + 2
    trained = notebook.storage(model).loc["all", "trained"]
    assert trained == adapters + pooler + classifier


@pytest.mark.parametrize("names", [["x", "y"], ["x", "y", "z"]])
def test_a_classifier_as_the_base_gets_a_head_for_the_new_classes(
    notebook, fit, save, names
):
    about = bert_config(num_labels=3, problem_type="regression")
    config = fit(save(BertForSequenceClassification(about)))
    model, head = notebook.load_published(config, names)
    assert head == ["classifier"]
    assert model.classifier.weight.shape == (len(names), 64)
    assert model.config.problem_type == "single_label_classification"
    assert model.config.id2label == dict(enumerate(names))


def test_the_seed_decides_the_head(notebook, fit, bert):
    heads = []
    for seed in (1, 1, 2):
        model, _ = notebook.load_classifier(fit(bert, seed=seed), NAMES)
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_levels_are_those_of_bitsandbytes(notebook):
    code = bnb.functional.get_4bit_type("nf4", device="cpu").double().numpy()
    assert np.abs(notebook.nf4_levels() - code).max() < 1e-6


def test_the_nearest_level_is_taken(notebook):
    values = np.array([[0.2, -2.0, 0.9], [0.5, 1.0, 0.0]])
    codes, scales = notebook.quantize(values, np.array([-1.0, 0, 0.5, 1]))
    assert codes.tolist() == [[1, 0, 2], [2, 3, 1]]
    assert scales.tolist() == [[2.0], [1.0]]


def test_the_settings_reach_bitsandbytes(notebook, fit, bert, head):
    config = fit(bert, bnb_4bit_use_double_quant=False)
    base = notebook.load_base(config, NAMES, head)
    state = base.bert.encoder.layer[0].attention.self.query.weight.quant_state
    assert state.quant_type == "nf4"
    assert not state.nested
    assert state.dtype == torch.float32


def test_all_linear_layers_but_the_head_are_in_4_bits(notebook, fit, bert, head):
    base = notebook.load_base(fit(bert), NAMES, head)
    linear = {}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear[name] = type(module)
    assert linear.pop("classifier") is torch.nn.Linear
    assert base.classifier.weight.dtype == torch.float32
    assert set(linear.values()) == {bnb.nn.Linear4bit}
    assert len(linear) == 2 * 6 + 1  # six in each layer, and the pooler


def test_storage_of_the_published_model_is_4_bytes_a_parameter(notebook, fit, bert):
    model, _ = notebook.load_classifier(fit(bert), NAMES)
    table = notebook.storage(model)
    assert table.loc["all", "parameters"] == model.num_parameters()
    assert table.loc["all", "MB"] * 1e6 == pytest.approx(4 * model.num_parameters())
    sums = table.drop("all").sum()
    assert sums.tolist() == pytest.approx(table.loc["all"].tolist())


def test_storage_counts_4_bit_weights_and_their_constants(notebook, fit, bert, head):
    config = fit(bert)
    model, _ = notebook.load_classifier(config, NAMES)
    table = notebook.storage(notebook.load_base(config, NAMES, head))
    assert table.loc["all", "parameters"] == model.num_parameters()
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64  # two layers and a pooler
    assert table.loc["matrices, 4-bit", "parameters"] == weights
    block_scales = weights / 64  # 8 bits each
    of_a_matrix = 4 * (16 + 256 + 1 + 1)  # two tables of levels, a scale, the mean
    expected = weights / 2 + block_scales + 13 * of_a_matrix
    assert table.loc["matrices, 4-bit", "MB"] * 1e6 == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_another_rank_keeps_the_scale(notebook, fit, bert, head, rank):
    config = notebook.with_rank(fit(bert, lora_r=4, lora_alpha=12), rank)
    lora = notebook.lora_config(config, head)
    assert lora.r == rank
    assert lora.lora_alpha / lora.r == 3


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_an_adapter_has_rank_times_inputs_and_outputs_parameters(
    notebook, fit, bert, head, rank
):
    model = notebook.build_qlora(notebook.with_rank(fit(bert), rank), NAMES, head)
    table = notebook.storage(model)
    assert table.loc["LoRA adapters", "trained"] == 2 * 2 * rank * (64 + 64)


def test_all_linear_adapts_all_but_the_head(notebook, fit, bert, head):
    config = fit(bert, target_modules="all-linear")
    model = notebook.build_qlora(config, NAMES, head)
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == 2 * 6 + 1
    assert [name for name in adapted if "pooler" in name]
    assert not [name for name in adapted if "classifier" in name]


@pytest.mark.parametrize("name", ["bert", "albert", "mpnet"])
def test_recomputed_layers_give_the_same_gradients(
    notebook, fit, save, monkeypatch, head, name
):
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*arguments, **options):
        calls.append(arguments)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (4, 12), generator=generator)
    folder = save(make_family(name))
    gradients = []
    for recomputes in (False, True):
        config = fit(folder, gradient_checkpointing=recomputes, lora_dropout=0.1)
        model = notebook.build_qlora(config, NAMES, head).train()
        randomize(model)
        torch.manual_seed(2)  # of the dropout
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=torch.tensor([0, 1, 0, 1]),
        )
        output.loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        gradients.append(trained)
        assert len(calls) == 2 * recomputes  # layers
    for kept, again in zip(*gradients):
        assert kept.abs().sum() > 0
        assert torch.equal(kept, again)


@pytest.fixture(params=["float32", "compute"])
def saved_adapter(notebook, fit, bert, head, tmp_path, request):
    """A random model, its settings, and the folder of its adapter.

    With "compute" the notebook's own forward pass of adapted layers is used.
    """
    targets = "query,value" if request.param == "float32" else "all-linear"
    config = fit(bert, frozen_dtype=request.param, target_modules=targets)
    model = notebook.build_qlora(config, NAMES, head)
    randomize(model, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return model, config, tmp_path / "adapter"


def test_an_adapter_from_disk_answers_as_the_trained_model(
    notebook, saved_adapter, tokenizer, head
):
    model, config, folder = saved_adapter
    reloaded = notebook.load_adapter(folder, config, NAMES, head)
    logits = notebook.predict_logits(model, TEXTS, config, tokenizer)
    again = notebook.predict_logits(reloaded, TEXTS, config, tokenizer)
    assert np.array_equal(logits, again)
    assert np.ptp(logits, axis=0).min() > 1e-2  # they depend on the text


def test_the_merged_model_is_plain_and_answers_as_the_adapter(
    notebook, saved_adapter, tokenizer, head, tmp_path
):
    model, config, folder = saved_adapter
    merged = notebook.merge_adapter(folder, config, NAMES, head)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged"
    )
    logits = notebook.predict_logits(model, TEXTS, config, tokenizer)
    again = notebook.predict_logits(loaded, TEXTS, config, tokenizer)
    assert np.abs(logits - again).max() < 1e-4
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert "lora" not in str(loaded)
