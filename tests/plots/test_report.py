"""Plots of a report show what a naive count of the lines gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from elmlib.config import InputError
from elmlib.plots.report import draw_report, plot_ranks, plot_similarity, ranks_info, similarity_info


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the predictions of 100 rows of 50 sources, every second of them without a name."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(100):
        source = row % 50
        predicted = rng.normal()
        lines.append(
            {
                "source_id": f"s{source}" if source % 2 else "",
                "embedding_index": source,
                "rank": int(rng.integers(1, 51)),
                "predicted_similarity": predicted,
                "drift_similarity": 0.5 * predicted + rng.normal(),
            }
        )
    write(tmp_path, lines)
    return tmp_path


def write(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_ranks_info_equals_a_naive_count(run: Path) -> None:
    info = ranks_info(run)
    ranks = [line["rank"] for line in read(run)]
    assert info.index.tolist() == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-50"]
    for label, count, chance in info.itertuples():
        first, last = int(label.split("-")[0]), int(label.split("-")[-1])
        assert count == sum(first <= rank <= last for rank in ranks)
        assert chance == pytest.approx(sum(100 / 50 for _ in range(first, last + 1)))
    assert info.summaries.sum() == 100 and info.chance.sum() == pytest.approx(100)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 8, 9, 64, 65])
def test_ranks_info_puts_every_rank_into_one_bin(tmp_path: Path, total: int) -> None:
    write(tmp_path, [{"source_id": f"s{r}", "embedding_index": r, "rank": r} for r in range(1, total + 1)])
    info = ranks_info(tmp_path)
    assert info.summaries.sum() == total and info.index.is_unique
    np.testing.assert_allclose(info.summaries, info.chance)


def test_ranks_info_refuses_impossible_ranks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"predictions\.jsonl does not exist"):
        ranks_info(tmp_path)
    write(tmp_path, [{"source_id": "a", "embedding_index": 0, "rank": 3}])
    with pytest.raises(InputError, match="ranks from 3 to 3 among 1 sources"):
        ranks_info(tmp_path)
    write(tmp_path, [{"source_id": "a", "embedding_index": 0}])
    with pytest.raises(InputError, match="line 1 has no 'rank'"):
        ranks_info(tmp_path)


def test_similarity_info_equals_the_lines_and_their_correlation(run: Path) -> None:
    info = similarity_info(run)
    x, y = (np.array([line[name] for line in read(run)]) for name in ("predicted_similarity", "drift_similarity"))
    assert info.predicted_similarity.tolist() == x.tolist() and info.drift_similarity.tolist() == y.tolist()
    deviations = (x - x.mean(), y - y.mean())
    naive = (deviations[0] * deviations[1]).sum() / np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    ax = Figure().subplots()
    plot_similarity(info, ax)
    assert ax.get_title() == f"Pearson r = {naive:.2f} over 100 summaries"


def test_similarity_info_reads_the_name_of_earlier_versions(run: Path) -> None:
    new = similarity_info(run)
    path = run / "predictions.jsonl"
    path.write_text(path.read_text().replace("predicted_similarity", "training_similarity"))
    assert similarity_info(run).equals(new)
    write(run, [{"drift_similarity": 0.5}])
    with pytest.raises(InputError, match="line 1 has no 'predicted_similarity'"):
        similarity_info(run)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "card.csv"
    path.write_text(
        "system,bertscore_composite,bertscore_f1,bertscore_f1_low,bertscore_f1_high\n"
        "true embeddings,0.9,0.3,0.25,0.35\nshuffled embeddings,0.9,0.1,0.05,0.15\nfirst sentence,0.9,0.4,0.3,0.5\n"
    )
    return path


def test_draw_report_shows_every_mean_with_its_interval(card: Path) -> None:
    (ax,) = draw_report(card).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "true embeddings", "shuffled embeddings", "first sentence"
    ]  # fmt: skip
    intervals = [segment[:, 0].tolist() for bars in ax.collections for segment in bars.get_segments()]
    assert intervals == [pytest.approx([0.25, 0.35]), pytest.approx([0.05, 0.15]), pytest.approx([0.3, 0.5])]
    assert [container[0].get_xdata().tolist() for container in ax.containers] == [[0.3], [0.1], [0.4]]


def test_draw_report_refuses_another_table(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("system,f1\nx,1\n")
    with pytest.raises(InputError, match=r"other\.csv has no column 'bertscore_f1'"):
        draw_report(tmp_path / "other.csv")


def test_plots_draw_what_was_read(run: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    first, second = figure.subplots(1, 2)
    plot_ranks(ranks_info(run), first)
    plot_similarity(similarity_info(run), second)
    figure.savefig(run / "all.png")
    assert (run / "all.png").read_bytes().startswith(b"\x89PNG")
    assert [bar.get_height() for bar in first.patches] == ranks_info(run).summaries.tolist()
    assert [line.get_label() for line in first.lines] == ["chance"]
    assert first.get_xlabel() == "rank of the own reference among 50"


def test_plots_import_no_torch() -> None:
    code = "import sys, elmlib.plots.report; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
