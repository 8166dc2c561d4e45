"""The settings of every command, presets, and settings files."""

from elmlib.config.commands import (
    CorpusConfig,
    DashboardConfig,
    EvaluateConfig,
    FilterConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
    StudyConfig,
    StudyPlace,
)
from elmlib.config.files import PRESETS, Preset, check_settings, make_config, preset_settings, read_settings
from elmlib.config.training import (
    OFFLINE_EMBEDDER,
    OFFLINE_LLM,
    SoftTokenPosition,
    SummaryTrainingConfig,
    base_config,
)

__all__ = [
    "OFFLINE_EMBEDDER",
    "OFFLINE_LLM",
    "PRESETS",
    "CorpusConfig",
    "DashboardConfig",
    "EvaluateConfig",
    "FilterConfig",
    "GenerateConfig",
    "PlanConfig",
    "Preset",
    "ReportConfig",
    "SoftTokenPosition",
    "StudyConfig",
    "StudyPlace",
    "SummaryTrainingConfig",
    "base_config",
    "check_settings",
    "make_config",
    "preset_settings",
    "read_settings",
]
