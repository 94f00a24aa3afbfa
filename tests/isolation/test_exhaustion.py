"""Using up what there is: processes, memory, disk, processor, descriptors. It ends at the sandbox's own limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from acceptance import Bystander, Client, Product, kernel, profile_kernelspec

MIB = 1024**2

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def tight(product: Product, bystander: Bystander, canary: str) -> Iterator[Client]:
    """A sandbox with small limits: 512 MiB of memory, 128 MiB of files, 100 processes, one core."""
    with profile_kernelspec(product, "tight") as name, kernel(name) as client:
        yield client


def test_a_fork_bomb_stays_within_its_processes(tight: Client, bystander: Bystander) -> None:
    before = len(psutil.pids())
    result = tight.run(
        "import os, time\n"
        "children = []\n"
        "try:\n"
        "    while len(children) < 5000:\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        "            time.sleep(600)\n"
        "            os._exit(0)\n"
        "        children.append(pid)\n"
        "except OSError as error:\n"
        "    print('refused', type(error).__name__, flush=True)\n"
        "print(len(children))\n",
        timeout=120,
    )
    assert result.status in ("ok", "dead"), result
    if result.status == "ok":
        assert result.stdout.startswith("refused BlockingIOError\n"), result.text
        assert int(result.stdout.split()[-1]) < 1000
        assert len(psutil.pids()) - before < 400
    else:
        assert "[sandbox]" in result.stderr
    bystander.check()


def test_a_real_fork_bomb_leaves_the_others_working(tight: Client, bystander: Bystander) -> None:
    """Every child forks on. The kernel may be beyond use afterwards; it can be ended, and others do not notice."""
    tight.client.execute("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass")
    for _ in range(3):
        bystander.check()


def test_threads_without_end_are_refused_or_end_the_kernel(tight: Client, bystander: Bystander) -> None:
    result = tight.run(
        "import threading\n"
        "stop = threading.Event()\n"
        "made = []\n"
        "try:\n"
        "    while len(made) < 20000:\n"
        "        t = threading.Thread(target=stop.wait, daemon=True); t.start(); made.append(t)\n"
        "except RuntimeError as error:\n"
        "    print('refused', flush=True)\n"
        "stop.set()\n"
        "print(len(made))",
        timeout=120,
    )
    assert result.status in ("ok", "dead"), result
    assert result.status == "dead" or "refused" in result.stdout, result.text
    bystander.check()


def test_a_memory_bomb_dies_and_says_out_of_memory(tight: Client, bystander: Bystander, product: Product) -> None:
    free = psutil.virtual_memory().available
    result = tight.run("blocks = []\nwhile True:\n    blocks.append(bytearray(b'x') * (16 * 1024 * 1024))", timeout=120)
    assert result.status == "dead", result.text[-500:]
    assert "out of memory" in result.stderr, result.stderr
    assert psutil.virtual_memory().available > free - 1024 * MIB
    bystander.check()
    told = {entry["id"]: entry for entry in product.ps()}.get(tight.id)
    assert told is None or "out of memory" in str(told), told


def test_after_out_of_memory_a_restart_makes_a_new_sandbox_and_says_that_files_are_lost(tight: Client) -> None:
    assert tight.run("open('kept.txt', 'w').write('x')").status == "ok"
    result = tight.run("blocks = []\nwhile True:\n    blocks.append(b'x' * (16 * 1024 * 1024))", timeout=120)
    assert result.status == "dead"
    name = tight.id
    tight.manager.restart_kernel(now=True)
    tight.client.wait_for_ready(timeout=90)
    result = tight.run("import os\nprint(os.path.exists('kept.txt'), os.environ['SANDBOX_ID'])")
    assert result.stdout == f"False {name}\n"


def on_disk(folder: Path) -> int:
    """Bytes that the files below a folder take: what is free is other programs' doing, too."""
    taken = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # some come and go
                taken += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return taken


@pytest.mark.parametrize("place", ["/tmp/fill", "fill", "/dev/shm/fill"])
def test_filling_the_disk_ends_at_the_limit(tight: Client, bystander: Bystander, product: Product, place: str) -> None:
    before = on_disk(product.home)
    result = tight.run(
        "import os\nwritten = 0\n"
        "try:\n"
        f"    with open({place!r}, 'wb') as file:\n"
        "        while written < 4096 << 20:\n"
        "            written += file.write(os.urandom(1 << 20))\n"
        "except OSError as error:\n    print(error.strerror, flush=True)\n"
        "print(written >> 20)",
        timeout=180,
    )
    if result.status == "ok":
        assert int(result.stdout.split()[-1]) <= 600, result.stdout
    else:
        assert result.status == "dead"
        assert "out of memory" in result.stderr, result.stderr
    assert on_disk(product.home) < before + 700 * MIB
    bystander.check()


def test_many_small_files_end_at_a_limit(tight: Client, bystander: Bystander) -> None:
    result = tight.run(
        "import os\nos.makedirs('/tmp/many', exist_ok=True)\nmade = 0\n"
        "try:\n"
        "    while made < 100_000:\n"
        "        open(f'/tmp/many/{made}', 'w').close(); made += 1\n"
        "except OSError as error:\n    print(error.strerror, flush=True)\n"
        "print(made)",
        timeout=120,
    )
    assert result.status in ("ok", "dead", "timeout")
    bystander.check()


def test_a_processor_hog_gets_its_share_only(tight: Client, bystander: Bystander) -> None:
    """Eight spinning processes in a sandbox of one core; the neighbour answers in time."""
    result = tight.run(
        "import subprocess, sys, time\n"
        "spin = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(8)]\n"
        "time.sleep(6)\nfor p in spin: p.kill()\n",
        timeout=90,
    )
    assert result.status == "ok", result.text
    bystander.check()
    assert bystander.slowest < 15


def test_descriptors_end_at_a_limit(tight: Client, bystander: Bystander) -> None:
    result = tight.run(
        "import os\nheld = []\ntry:\n    while len(held) < 3_000_000: held.append(os.open('/dev/null', 0))\n"
        "except OSError as error: reason = error.strerror\nfor fd in held: os.close(fd)\nprint(reason)",
        timeout=120,
    )
    assert result.status == "ok", result
    assert result.stdout == "Too many open files\n"
    bystander.check()


def test_a_full_host_pipe_cannot_be_provoked_by_not_reading(tight: Client, bystander: Bystander) -> None:
    """A client that never reads while the kernel writes 100 MB: bounded memory here, and the kernel goes on."""
    own = psutil.Process(os.getpid())
    before = own.memory_info().rss
    tight.client.execute("for n in range(100):\n    print('x' * 1_000_000)")
    bystander.check()
    bystander.check()
    assert own.memory_info().rss - before < 600 * MIB
