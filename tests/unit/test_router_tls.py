"""TLS towards callers, and towards workers that ask for a certificate."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from symphony_sglang.errors import ConfigError
from symphony_sglang.router.arguments import RouterSettings
from symphony_sglang.router.service import RouterService, router_tls, worker_tls


def self_signed(directory: Path, name: str) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1, its own authority, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory / f"{name}.pem", directory / f"{name}.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(certificate_path), str(key_path)


def test_tls_towards_callers_and_mutual_tls_towards_workers(tmp_path: Path) -> None:
    router_cert, router_key = self_signed(tmp_path, "router")
    worker_cert, worker_key = self_signed(tmp_path, "worker")
    client_cert, client_key = self_signed(tmp_path, "client")

    async def scenario() -> None:
        async def answer(_request: web.Request) -> web.Response:
            return web.json_response({"text": "hello"})

        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(worker_cert, worker_key)
        context.load_verify_locations(client_cert)
        context.verify_mode = ssl.CERT_REQUIRED
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        settings = RouterSettings(
            worker_urls=(f"https://127.0.0.1:{runner.addresses[0][1]}",),
            policy="round_robin",
            prometheus_port=0,
            tls_cert_path=router_cert,
            tls_key_path=router_key,
            client_cert_path=client_cert,
            client_key_path=client_key,
            ca_cert_paths=(worker_cert,),
        )
        service = RouterService(settings)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.setblocking(False)
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            trust = ssl.create_default_context(cafile=router_cert)
            async with service.running(), aiohttp.ClientSession() as client:
                await service.server.start([listener], router_tls(settings))
                async with asyncio.timeout(10):
                    while not service.registry.healthy():  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                async with client.post(f"{url}/generate", json={"text": "x"}, ssl=trust) as got:
                    assert got.status == 200
                    assert await got.json() == {"text": "hello"}
                # A caller that is still sending gets its answer over TLS too.
                big = b"x" * 3_000_000
                async with client.post(f"{url}/workers", data=big, ssl=trust) as got:
                    assert got.status == 413
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await client.get(f"{url}/health")
                await service.server.stop(1.0)
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_files_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        router_tls(RouterSettings(tls_cert_path=missing, tls_key_path=missing))
    with pytest.raises(ConfigError, match="certificate"):
        worker_tls(RouterSettings(ca_cert_paths=(missing,)))
