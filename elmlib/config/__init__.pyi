from .commands import CorpusConfig as CorpusConfig, DashboardConfig as DashboardConfig
from .commands import EvaluateConfig as EvaluateConfig, FilterConfig as FilterConfig, GenerateConfig as GenerateConfig
from .commands import PlanConfig as PlanConfig, ReportConfig as ReportConfig
from .commands import StudyConfig as StudyConfig, StudyPlace as StudyPlace
from .files import PRESETS as PRESETS, InputError as InputError, check_settings as check_settings
from .files import make_config as make_config
from .files import preset_settings as preset_settings, read_settings as read_settings
from .training import OFFLINE_EMBEDDER as OFFLINE_EMBEDDER, OFFLINE_LLM as OFFLINE_LLM
from .training import SoftTokenPosition as SoftTokenPosition, SummaryTrainingConfig as SummaryTrainingConfig
from .training import base_config as base_config
