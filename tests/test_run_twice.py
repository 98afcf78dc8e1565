"""The runs of hosts.py: cells that run again, or fail; the kernel is used up by it."""

import ast

import pytest
from hosts import BEFORE_SECTION_10, PARTS
from nbclient.exceptions import CellExecutionError

# Ends of names of what differs from run to run.
TIMES = (
    "seconds",
    "_second",
    "runtime",
    "started",
    "sections",
    "train_loss",
)


def untimed(value):
    """Return what was measured or decided, without times."""
    if isinstance(value, dict):
        kept = {}
        for name, each in value.items():
            if not name.endswith(TIMES):
                kept[name] = untimed(each)
        return kept
    if isinstance(value, list):
        return [untimed(each) for each in value]
    return value


def before_section_10(results):
    """Return what does not depend on sections 10 and 11, without times."""
    kept = untimed({name: results[name] for name in BEFORE_SECTION_10})
    for name in list(kept["provenance"]["config"]):
        if name.startswith(("rank", "efficiency_steps", "predict_name")):
            del kept["provenance"]["config"][name]
    return kept


def test_results_are_written_before_section_10_and_stay(run):
    early = run.kernel.early
    assert sorted(early) == sorted(PARTS)
    assert early["efficiency"] == []
    assert early["rank_sensitivity"] == []
    assert before_section_10(early) == before_section_10(run.results)


def test_a_classifier_of_another_training_is_not_replaced_without_a_word(run):
    """Its cell is asked with other settings, twice, and then with the run's own."""
    kernel = run.kernel
    for place in kernel.sections[8]:
        if "differing(shipped_settings" in kernel.nb.cells[place].source:
            break
    source = kernel.nb.cells[place].source
    kernel.run(0, "all_steps = list(finished_steps)")
    said = []
    for seed in (9, 9, 42):  # 42 is its own
        kernel.run(0, f"config = config.model_copy(update={{'seed': {seed}}})")
        outputs = kernel.run(place, source)
        said.append(" ".join("".join(output.text for output in outputs).split()))
    kernel.run(0, "finished_steps = all_steps")
    for each in said[:2]:
        assert "A new training." in each
        assert "another training (another seed)" in each
    assert "is finished" in said[2]
    assert "another" not in said[2]


def test_a_run_cell_can_be_run_twice(run):
    assert run.kernel.failed == {}


@pytest.mark.parametrize("part", BEFORE_SECTION_10)
def test_run_cells_run_twice_give_the_results_of_running_them_once(run, hosts, part):
    once = before_section_10(hosts.colab.results())
    twice = before_section_10(run.results)
    assert once[part] == twice[part]


def models(kernel):
    """Return all files of adapter and merged model."""
    files = {}
    for path in kernel.working.glob("outputs/*/*"):
        if path.is_file():
            files[path] = path.read_bytes()
    return files


@pytest.mark.parametrize("section", [10, 11, 12])
def test_a_section_that_fails_loses_nothing_of_those_before(run, section):
    """Its first run cell raises where its last statement was."""
    kernel = run.kernel
    before = kernel.results()
    files = models(kernel)
    place = next(filter(kernel.does_something, kernel.sections[section]))
    tree = ast.parse(kernel.nb.cells[place].source)
    tree.body[-1:] = ast.parse("raise RuntimeError('injected')").body
    with pytest.raises(CellExecutionError, match="injected"):
        kernel.run(place, ast.unparse(tree))
    assert kernel.results() == before
    assert models(kernel) == files
    assert len(files) >= 8


def test_the_baseline_is_replaced_with_the_classifier_and_not_before(run):
    """So that what `outputs` holds is what results.json scored."""
    path = run.kernel.working / "outputs" / "tfidf.joblib"
    path.write_bytes(b"of another run")
    run.kernel.run(0, "all_steps = list(finished_steps)")
    for place in run.kernel.sections[5]:
        run.kernel.run(place)
    run.kernel.run(0, "finished_steps = all_steps")
    assert path.read_bytes() == b"of another run"


def test_each_section_can_be_run_again_after_a_finished_run(run):
    for section in range(12, 3, -1):
        for place in run.kernel.sections[section]:
            run.kernel.run(place)
    again = run.kernel.results()
    for part in ("test", "test_merged", "training"):
        assert untimed(again[part]) == untimed(run.results[part])
    assert (run.kernel.working / "outputs" / "tfidf.joblib").stat().st_size > 1000
