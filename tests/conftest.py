"""Fixtures that several packages share. Expensive ones live as long as the session."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No test depends on how fast the machine is; those that need more examples ask for them.
settings.register_profile("rlsys", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlsys")


@pytest.fixture(autouse=True)
def _every_metric_is_defined(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run that logs a metric without a definition fails its test, unless that asks for `undefined_metrics`."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rlsys.metrics.catalog")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not said or "undefined_metrics" in request.fixturenames, said


@pytest.fixture
def undefined_metrics() -> None:
    """This test logs some on purpose."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small untrained Qwen3 (character tokenizer, 256 positions) in Hugging Face format."""
    from rlsys.config.models import TinyModelConfig, WarmStartConfig
    from rlsys.models.tiny import ensure_tiny_model

    config = TinyModelConfig(
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=32,  # vLLM has no attention for smaller ones on CPU
        cache_dir=str(tmp_path_factory.mktemp("models")),
        warm_start=WarmStartConfig(steps=0),
    )
    return ensure_tiny_model(config, max_length=256, demonstrations=lambda: iter(()), fingerprint="untrained")


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own in memory."""

    path: Path

    def grow(self, kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", self.path], check=True, capture_output=True)

    def fill(self, free_kib: int = 0) -> None:
        """Leave so much room and no more."""
        free = shutil.disk_usage(self.path).free - free_kib * 1024
        with (self.path / "filler").open("ab") as file:
            file.write(bytes(max(0, free)))


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], SmallDisk]]:
    """`small_disk(kib=64)` mounts one."""
    mounted: list[Path] = []

    def mount(kib: int) -> SmallDisk:
        if shutil.which("mount") is None:
            pytest.skip("a small file system cannot be mounted here: there is no mount")
        path = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return SmallDisk(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def _node(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched in a test is kept out of the user's cache."""
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path_factory.mktemp("node")))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with a bucket `bucket`: moto's, over HTTP."""
    pytest.importorskip("s3fs", reason="tests over S3 need the packages of rlsys[s3-tests]")
    server_module = pytest.importorskip("moto.server", reason="tests over S3 need the packages of rlsys[s3-tests]")

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of an empty place in it; the environment says how to get there."""
    import boto3

    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    return f"s3://bucket/{tmp_path.parent.name}/{tmp_path.name}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, which notes what it logs and what it fetches."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium here: Debian's packages chromium and chromium-driver have it")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is a dependency for development")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    started.set_window_size(1280, 900)
    yield started
    started.quit()
