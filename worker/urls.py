"""What is wrong with a URL of the settings, in fixed sentences: a parser's own may quote the password in it."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qsl, urlsplit

# What Celery, its beat and the client of Redis all take as text.
_SSL = tuple(
    f"ssl_{name}"
    for name in ("ca_certs", "ca_path", "certfile", "keyfile", "password", "ciphers", "check_hostname", "cert_reqs")
)
_CERT_REQS = {"required", "optional", "none"}
# The S3 client's own rule for a host, by which it refuses an underscore.
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def require_postgres(url: str) -> None:
    """Raise ValueError unless the PostgreSQL client understands it."""
    import psycopg.conninfo  # noqa: PLC0415 - only a command with a database pays for the driver

    if _split(url, "is not a URL; a sign in the password may have to be written as %xx").scheme not in {
        "postgres",
        "postgresql",
    }:
        raise ValueError("must start with postgres:// or postgresql://")
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        # The driver's message may quote a piece of the password.
        raise ValueError("is not a URL the PostgreSQL client understands") from None


def require_redis(url: str) -> None:
    """Raise ValueError unless it is a Redis that worker, beat and ping can all reach."""
    says = "must be a redis:// or rediss:// URL with a host"
    parts = _split(url, says)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname or not _has_port(parts):
        raise ValueError(says)
    if not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
        raise ValueError("must end in the number of a database, such as /0")
    options = parse_qsl(parts.query, keep_blank_values=True)
    if any(name not in _SSL for name, _ in options):
        # The parts of Celery do not understand the same others.
        raise ValueError(f"may have no options but {', '.join(_SSL)} (the password stands before the host)")
    if options and parts.scheme != "rediss":
        raise ValueError("must be a rediss:// URL for ssl_... to mean anything")
    if any(name == "ssl_cert_reqs" and value not in _CERT_REQS for name, value in options):
        raise ValueError("may have ssl_cert_reqs only as required, optional or none")


def require_http(url: str) -> None:
    """Raise ValueError unless the S3 client takes it as an endpoint."""
    says = "must be an http:// or https:// URL"
    parts = _split(url, says)
    if parts.scheme not in {"http", "https"} or not parts.hostname or not _has_port(parts) or not url.isprintable():
        raise ValueError(says)
    if not _is_host(parts.hostname):
        raise ValueError(
            "names a host that the S3 client refuses: letters, digits, dots and dashes within, no _; "
            "give the store another name, or its address"
        )


def _split(url: str, says: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise ValueError(says) from None


def _has_port(parts: SplitResult) -> bool:
    """Whether a URL's port is one, or left out."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _is_host(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return len(name) <= 255 and all(map(_LABEL.fullmatch, name.removesuffix(".").split(".")))
    return True
