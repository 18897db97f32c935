# The names that this folder offers to others; they are imported when they are first asked for.
from .commands import app as app
from .commands import main as main
from .frame import register_command as register_command
from .frame import say as say
from .frame import say_json as say_json
from .training import parse_settings as parse_settings
