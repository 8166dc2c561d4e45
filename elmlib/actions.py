"""What each sub-command of `elm` does with its settings: the work is elsewhere, here it is started and told of."""

from pathlib import Path
from typing import Any

from elmlib.benchmark_commands import BenchmarkConfig, PlanConfig
from elmlib.commands import (
    AblateConfig,
    CorpusConfig,
    DemoConfig,
    EvaluateConfig,
    FilterConfig,
    GenerateConfig,
    ReportConfig,
    TourConfig,
)
from elmlib.config import SummaryTrainingConfig
from elmlib.study_commands import DashboardConfig, ReapConfig, StudyConfig, StudyDemoConfig


def corpus(config: CorpusConfig) -> None:
    """Make a multi-task corpus with embeddings from docstrings, a JSONL file or a Hugging Face dataset."""
    from elmlib.corpus import build_corpus
    from elmlib.pretrained import encode, load_embedder

    embedder = load_embedder(config.embedding_model_name, _device())
    print(build_corpus(config, lambda texts: encode(embedder, texts, config.embedding_batch_size)).to_table())


def filter_(config: FilterConfig) -> None:
    """Keep one task of a corpus and its embeddings, and check that no source stands in two splits."""
    from elmlib.filtering import filter_corpus

    print(filter_corpus(config).to_table())


def train(config: SummaryTrainingConfig) -> None:
    """Train an adapter; --config FILE or --resume-from CHECKPOINT gives the settings, flags beside it win."""
    from accelerate import PartialState

    from elmlib.plots import draw_curves
    from elmlib.tables import score_table
    from elmlib.trainer import train

    result = train(config)
    if not PartialState().is_main_process:  # one of several processes is enough to tell
        return
    curves = result.best.with_name("curves.png")
    draw_curves(curves.parent).savefig(curves, dpi=120)
    print(f"{score_table(result.metrics)}\nbest adapter: {result.best}\ncurves: {curves}")


def generate(config: GenerateConfig) -> None:
    """Write a summary for every record of a split, or for every row of a file of embeddings."""
    from elmlib.generation import generate_file

    made = generate_file(
        config.checkpoint, config.input, config.output, config.embeddings, config.batch_size,
        config.max_new_tokens or None, _device(), _sampling(config),
    )  # fmt: skip
    print(f"{made} summaries written to {config.output}")


def evaluate(config: EvaluateConfig) -> None:
    """Score predictions against their references with BERTScore, beside the same predictions shuffled."""
    from elmlib.bertscore import BERTScoreEvaluator
    from elmlib.evaluation import score_texts
    from elmlib.generation import read_pairs
    from elmlib.records import write_json
    from elmlib.tables import score_table

    pairs = read_pairs(config.predictions, config.references)
    evaluator = BERTScoreEvaluator(config.bertscore_model, config.bertscore_batch_size, _device(), pairs.references)
    metrics = score_texts(evaluator, *pairs, config.seed)
    result = metrics | {"bertscore_hash": evaluator.hash}
    print(score_table(result))
    if config.output:
        write_json(config.output, result)


def report(config: ReportConfig) -> None:
    """Hold an adapter against its controls, from shuffled embeddings to the LLM that reads the text."""
    from elmlib.report_plots import draw_scorecard
    from elmlib.scorecard import score_checkpoint

    card = score_checkpoint(
        config.checkpoint, config.data_dir, config.split, config.samples, _sampling(config), _device()
    )
    print(card.to_text())
    if config.output:
        card.write_csv(config.output)
        picture = config.output.with_suffix(".png")
        draw_scorecard(config.output).savefig(picture, dpi=120)
        print(f"table: {config.output}\npicture: {picture}")


def ablate(config: AblateConfig) -> None:
    """Train variants of the settings for equal time at several seeds: what each part of the defaults is worth."""
    from elmlib.ablation import run_ablation

    print(f"{run_ablation(config)}\ntable and picture: {config.output_dir}/ablation.*")


def study(config: StudyConfig) -> None:
    """Search hyperparameters: each trial is an executed notebook; killed, the study goes on where it was."""
    from elmlib.study import report, run_study, submit_workers

    if config.slurm:
        jobs = submit_workers(config)
        print(f"workers submitted: {', '.join(jobs)}\nto watch them: elm dashboard --study-name {config.study_name}")
        return
    print(report(run_study(config), config))


def dashboard(config: DashboardConfig) -> None:
    """Watch a study in a browser, with each trial's curves, summaries and notebook."""
    from elmlib.study import serve_dashboard

    print(f"http://127.0.0.1:{config.port}/dashboard  (Ctrl-C ends it)", flush=True)
    serve_dashboard(config)


def reap(config: ReapConfig) -> None:
    """Fail the trials of a study whose worker is gone, and put them back into the queue."""
    from elmlib.study import reap_study

    lost = reap_study(config)
    print(f"{len(lost)} trials had lost their worker" + (f": {', '.join(map(str, lost))}" if lost else ""))


def plan(config: PlanConfig) -> None:
    """Foretell memory and work of a training step from the LLM's config alone, and which cards it fits."""
    from elmlib.planning import plan, to_text

    print(to_text(plan(config)))


def benchmark(config: BenchmarkConfig) -> None:
    """Time elmlib beside its naive twin and the bare LLM on this machine: steps, evaluation, filter, memory."""
    from elmlib.benchmark import run_benchmark
    from elmlib.benchmark_tables import read_benchmark, to_text

    path = run_benchmark(config)
    print(f"{to_text(*read_benchmark(path.parent))}\n\nresults: {path}\npicture: {path.with_suffix('.png')}")


def demo(config: DemoConfig) -> None:
    """Run notebooks 00 to 02 through papermill, from docstrings to summaries written from their vectors."""
    from elmlib.demo import demo_stages, report, run_stages

    run_stages(demo_stages(config), config.output_dir, Path("notebooks"))
    print(f"\n{report(config.output_dir)}")


def study_demo(config: StudyDemoConfig) -> None:
    """Run a small study, its trials and its analysis through papermill: notebooks 00, 01, 03 and 04."""
    from elmlib.demo import run_stages, study_stages

    notebooks = Path("notebooks")
    run_stages(study_stages(config, notebooks), config.output_dir, notebooks)
    print(f"\nanalysis: {config.output_dir / '04_analysis.ipynb'}")


def tour(config: TourConfig) -> None:
    """Run all seven notebooks through papermill at a small size, one after the other."""
    from elmlib.demo import run_tour

    run_tour(config, Path("notebooks"))
    print(f"\nexecuted notebooks: {config.output_dir}")


def _sampling(config: GenerateConfig | ReportConfig) -> Any:
    from elmlib.decoding import Sampling

    return Sampling(config.candidates, config.temperature, config.top_p) if config.candidates else None


def _device() -> Any:
    from elmlib.pretrained import default_device

    return default_device()
