"""Keys: who calls, and what each caller may do.

limits.py      what a key is held to
principal.py   a caller: name, scopes, limits
scopes.py      the scope that a route needs
permission.py  a principal's scopes and limits, checked
rate.py        requests per minute
key_text.py    `sk-steer-ID-SECRET`
hashing.py     scrypt of the secret
key_file.py    the file of keys, read and written
keyring.py     the file in use: authenticates, reloads
binding.py     no open server on a network
command.py     `steerserve keys`
"""

from .binding import check_binding
from .keyring import KeyRing
from .limits import Limits
from .permission import check_limits, check_may_steer, check_scope
from .principal import ANYONE, NOBODY, SCOPES, Principal
from .rate import RateExceededError, RateLimiter
from .scopes import required_scope, runs_model

__all__ = [
    "ANYONE",
    "NOBODY",
    "SCOPES",
    "KeyRing",
    "Limits",
    "Principal",
    "RateExceededError",
    "RateLimiter",
    "check_binding",
    "check_limits",
    "check_may_steer",
    "check_scope",
    "required_scope",
    "runs_model",
]
