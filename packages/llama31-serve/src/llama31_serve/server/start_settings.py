"""The flags of `llama31-serve start`, over MindIE's config.json if one is given: what both say, the flags decide."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llama31_serve.errors import StartError
from llama31_serve.server.listener import Security
from llama31_serve.server.mindie_file import load_mindie_config
from llama31_serve.server.mindie_settings import settings_of
from llama31_serve.server.options import PORTS, EngineOptions, ServerOptions
from llama31_serve.server.peer_check import PeerCheck
from llama31_serve.server.settings import Settings
from llama31_serve.server.tls import ServerTls
from llama31_serve.server.token_auth import load_tokens


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Raises StartError for what cannot be served."""
    if arguments.config is not None:
        config = load_mindie_config(arguments.config)
        any_address = bool(arguments.allow_any_address)
        settings = settings_of(config, arguments.config, allow_any_address=any_address, replica=arguments.replica)
    else:
        settings = Settings(arguments.model, ServerOptions(model_name=arguments.model.resolve().name))
    engine = replace(settings.engine, **_given(arguments, EngineOptions))
    options = replace(settings.options, engine=engine, **_given(arguments, ServerOptions))
    if arguments.replica is not None:
        options = _raised(options, arguments.replica)
    asked = arguments.tensor_parallel
    tensor_parallel = settings.tensor_parallel if asked is None else asked
    if tensor_parallel < 1:
        raise StartError(f"--tensor_parallel is {tensor_parallel}, allowed are numbers from 1 up")
    level = arguments.log_level or settings.log_level
    security, management = _security(arguments, settings)
    return replace(
        settings,
        options=options,
        engine=engine,
        log_level=level,
        tensor_parallel=tensor_parallel,
        security=security,
        management_security=management,
    )


def _raised(options: ServerOptions, by: int) -> ServerOptions:
    """With every port raised; 0 stays any free one."""
    if by < 0:
        raise StartError(f"--replica is {by}, allowed are numbers from 0 up")
    ports = {name: getattr(options, name) for name in PORTS}
    return replace(options, **{name: port + by for name, port in ports.items() if port})


def _given(arguments: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The fields of an options class that a flag was given for."""
    found = {name: getattr(arguments, name, None) for name in (field.name for field in fields(kind))}
    return {name: value for name, value in found.items() if value is not None}


def _security(arguments: argparse.Namespace, settings: Settings) -> tuple[Security, Security | None]:
    """TLS by flags is for every listener; tokens are in any case."""
    tokens = () if arguments.token_file is None else load_tokens(arguments.token_file)
    tls = _tls(arguments)
    if tls is not None:
        return Security(tls, tokens), None
    management = settings.management_security
    return replace(settings.security, tokens=tokens), None if management is None else replace(management, tokens=tokens)


def _tls(arguments: argparse.Namespace) -> ServerTls | None:
    given = (
        arguments.tls_cert,
        arguments.tls_key,
        arguments.tls_key_password,
        arguments.tls_client_ca,
        arguments.tls_crl,
        arguments.tls_allow_name,
    )
    if not any(given):
        return None
    if arguments.tls_cert is None or arguments.tls_key is None:
        raise StartError("TLS needs both --tls_cert and --tls_key; give both")
    authorities: tuple[Path, ...] = () if arguments.tls_client_ca is None else (arguments.tls_client_ca,)
    crls: tuple[Path, ...] = () if arguments.tls_crl is None else (arguments.tls_crl,)
    peers = PeerCheck(crls, frozenset(arguments.tls_allow_name or ()))
    return ServerTls(arguments.tls_cert, arguments.tls_key, authorities, arguments.tls_key_password, peers)
