"""A sandboxed kernel through jupyter_client's synchronous door: start, interrupt, restart, death, shutdown."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
from acceptance import FILES_KERNEL, KERNEL, START, Client, Product, environment, kernel, profile_kernelspec, until
from jupyter_client.manager import KernelManager
from suspending import Running

from sandbox_gateway.errors import SandboxGatewayError


def test_a_cell_runs_inside_gvisor(client: Client) -> None:
    assert client.run("print(6 * 7)").stdout == "42\n"
    assert "gvisor" in client.run("import platform; print(platform.release())").stdout.lower()


def test_the_kernel_knows_its_id(client: Client) -> None:
    assert client.run("import os; print(os.environ['SANDBOX_ID'])").stdout.strip() == client.id


@pytest.mark.parametrize("policy", ["auto", "required"])
def test_encryption_is_refused_where_it_is_required_and_never_only_pretended(product: Product, policy: str) -> None:
    manager = KernelManager(kernel_name=KERNEL, transport_encryption=policy)
    # As ipykernel's own kernelspec says, which JUPYTER_DEFAULT_PROVISIONER_NAME may put into a sandbox.
    assert manager.kernel_spec is not None
    manager.kernel_spec.metadata["supported_encryption"] = "curve"
    if policy == "required":
        before = product.ids()
        with pytest.raises(SandboxGatewayError, match="not encrypted"):
            manager.start_kernel()
        assert product.ids() == before
        return
    manager.start_kernel()
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=START)
        assert manager.curve_publickey is None
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_ps_shows_the_running_kernel_with_its_owner(client: Client, product: Product) -> None:
    row = next(row for row in product.ps() if row["id"] == client.id)
    assert (row["state"], row["profile"], row["runtime"]) == ("running", KERNEL, "gvisor")
    assert row["owner_pid"] == os.getpid()


def test_input_reaches_the_one_who_runs_the_cell(client: Client) -> None:
    result = client.run("name = input('who? ')\nprint('hello', name)", answer=lambda prompt: prompt[:3])
    assert result.stdout.endswith("hello who\n")


def test_an_interrupt_stops_a_loop_and_keeps_the_state(client: Client) -> None:
    client.run("x = 5")
    cell = Running(client, "import time\nprint('in it', flush=True)\nwhile True: time.sleep(0.1)")
    while "in it" not in cell.stdout:
        assert cell.take()
    client.manager.interrupt_kernel()
    reply = cell.finish()
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
    assert client.run("print(x)").stdout == "5\n"


def test_a_restart_keeps_files_and_endpoints_and_forgets_variables(client: Client) -> None:
    client.run("open('/home/jovyan/kept.txt', 'w').write('still here'); x = 1")
    before = client.client.get_connection_info()
    client.manager.restart_kernel()
    client.client.wait_for_ready(timeout=60)
    assert client.client.get_connection_info()["ip"] == before["ip"]
    assert client.run("print(open('/home/jovyan/kept.txt').read())").stdout == "still here\n"
    assert client.run("x").error.startswith("NameError")


def test_a_restart_ends_every_process_the_kernel_started(client: Client) -> None:
    client.run("import subprocess; p = subprocess.Popen(['setsid', '-f', 'sleep', '777'])")
    listing = "import subprocess; print(subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout)"
    until(lambda: "sleep 777" in client.run(listing).stdout)
    client.manager.restart_kernel(now=True)
    client.client.wait_for_ready(timeout=60)
    assert "sleep 777" not in client.run(listing).stdout


def test_a_client_made_after_a_restart_reaches_the_kernel(client: Client) -> None:
    client.manager.restart_kernel(now=True)
    other = client.manager.blocking_client()
    other.start_channels()
    try:
        other.wait_for_ready(timeout=60)
    finally:
        other.stop_channels()


def test_a_kernel_that_ends_itself_is_reported_with_its_exit_code(client: Client) -> None:
    result = client.run("import os; os._exit(3)")
    assert result.status == "dead"
    assert "exited with code 3" in result.stderr
    assert client.manager.provisioner is not None
    assert client.manager.is_alive() is False


def test_a_killed_kernel_is_reported_with_its_signal(client: Client) -> None:
    result = client.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert result.status == "dead" and "SIGSEGV" in result.stderr


def test_out_of_memory_is_named_and_a_restart_makes_a_new_sandbox(product: Product) -> None:
    with profile_kernelspec(product, "tight") as name, kernel(name) as client:
        client.run("open('/home/jovyan/lost.txt', 'w').write('x')")
        result = client.run("blocks = []\nwhile True: blocks.append(bytearray(b'x' * 2**24))")
        assert result.status == "dead" and "out of memory" in result.stderr.lower()
        client.manager.restart_kernel(now=True)
        client.client.wait_for_ready(timeout=60)
        assert client.run("import os; print(os.path.exists('/home/jovyan/lost.txt'))").stdout == "False\n"
        assert client.id in product.ids()


def test_only_listed_variables_of_the_client_come_in(product: Product) -> None:
    with environment(TZ="Asia/Tokyo", SG_SECRET="do not tell"), kernel(KERNEL) as client:
        found = client.value("import os, json; print(json.dumps(dict(os.environ)))")
        assert found["TZ"] == "Asia/Tokyo"
        assert "SG_SECRET" not in found and "JPY_PARENT_PID" not in found


def test_two_kernels_share_nothing(product: Product) -> None:
    with kernel(KERNEL) as one, kernel(KERNEL) as two:
        one.run("open('/tmp/mine', 'w').write('x'); import os; os.environ['MINE'] = '1'")
        seen = two.value("import os, json; print(json.dumps([os.path.exists('/tmp/mine'), os.environ.get('MINE')]))")
        assert seen == [False, None]
        assert one.manager.session.key != two.manager.session.key


def test_a_synchronous_manager_keeps_its_kernel_while_the_application_does_something_else(client: Client) -> None:
    message = client.client.execute("import time\nfor i in range(30): print(i, flush=True); time.sleep(0.1)")
    threading.Event().wait(4.0)  # no call into jupyter_client meanwhile: nothing of it turns an event loop
    seen = ""
    while True:
        found = client.client.get_iopub_msg(timeout=20)
        if found["parent_header"].get("msg_id") != message:
            continue
        if found["msg_type"] == "stream":
            seen += found["content"]["text"]
        if found["msg_type"] == "status" and found["content"]["execution_state"] == "idle":
            break
    assert seen == "".join(f"{i}\n" for i in range(30))


def test_binary_buffers_pass_both_ways(client: Client) -> None:
    code = """
from ipykernel.comm import Comm
import comm
def opened(c, msg):
    @c.on_msg
    def echo(m):
        c.send({'n': len(m['buffers'])}, buffers=[bytes(b)[::-1] for b in m['buffers']])
comm.get_comm_manager().register_target('echo', opened)
"""
    assert client.run(code).status == "ok"
    session, channel = client.client.session, client.client.shell_channel
    channel.send(session.msg("comm_open", {"comm_id": "c1", "target_name": "echo", "data": {}}))
    message = session.msg("comm_msg", {"comm_id": "c1", "data": {}})
    session.send(channel.socket, message, buffers=[b"\x00abc\xff", b"x" * 100_000])
    while True:
        found = client.client.get_iopub_msg(timeout=20)
        if found["msg_type"] == "comm_msg":
            break
    assert [bytes(buffer) for buffer in found["buffers"]] == [b"\xffcba\x00", b"x" * 100_000]


def test_the_first_missing_file_is_explained_once(client: Client) -> None:
    first = client.run("open('data.csv')")
    second = client.run("open('data.csv')")
    assert first.error.startswith("FileNotFoundError") and "this folder" in first.stderr
    assert "this folder" not in second.stderr


def test_the_workspace_is_the_working_directory_and_its_files_belong_to_the_user(
    product: Product, tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    os.chown(tmp_path, 1234, 1234) if os.geteuid() == 0 else None
    with kernel(FILES_KERNEL, cwd=str(tmp_path)) as client:
        assert client.run("print(open('data.csv').read())").stdout == "a,b\n1,2\n\n"
        assert client.run("import os; print(os.getcwd())").stdout == "/home/jovyan/work\n"
        assert client.run("open('made.txt', 'w').write('by a cell')").status == "ok"
    made = tmp_path / "made.txt"
    assert made.read_text() == "by a cell"
    assert made.stat().st_uid == tmp_path.stat().st_uid


def test_a_workspace_owned_by_root_leaves_the_kernel_without_capabilities(product: Product, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the workspace has to belong to it")
    with kernel(FILES_KERNEL, cwd=str(tmp_path)) as client:
        status = client.run("print(open('/proc/self/status').read())").stdout
        assert re.search(r"Uid:\s+0\s", status)
        for name in ("CapPrm", "CapEff", "CapBnd", "CapInh"):
            assert re.search(rf"{name}:\s+0+\n", status), f"{name} in {status}"


def test_our_own_data_never_shows_in_a_workspace_that_contains_it(product: Product) -> None:
    with kernel(FILES_KERNEL, cwd=str(product.home.parent)) as client:
        shown = client.value("import os, json; print(json.dumps(os.listdir('home')))")
        assert shown == []


def test_a_missing_interpreter_is_one_clear_error(product: Product) -> None:
    root = product.home.parent / "own2"
    folder = root / "kernels" / "absent"
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "argv": ["/no/such/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "absent",
        "language": "python",
        "metadata": {"kernel_provisioner": {"provisioner_name": "sandbox", "config": {}}},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    before = product.ids()
    search = os.pathsep.join([str(root), os.environ.get("JUPYTER_PATH", "")])
    with environment(JUPYTER_PATH=search), pytest.raises(Exception, match="/no/such/python"), kernel("absent"):
        pass
    assert product.ids() == before


def test_shutdown_leaves_no_directory(product: Product) -> None:
    with kernel(KERNEL) as client:
        directory = product.home / "run" / client.id
        assert directory.is_dir()
    assert not directory.exists()


def test_a_signal_reaches_the_process_group(client: Client) -> None:
    client.run("import signal; got = []; signal.signal(signal.SIGUSR1, lambda *_: got.append(1))")
    client.manager.signal_kernel(signal.SIGUSR1)
    until(lambda: client.run("print(len(got))").stdout == "1\n")


def test_the_tokens_of_jupyter_servers_never_show_in_a_workspace_that_contains_them(
    product: Product, tmp_path: Path
) -> None:
    runtime = tmp_path / "share" / "runtime"
    runtime.mkdir(parents=True)
    (runtime / "jpserver-1.json").write_text("a token")
    with environment(JUPYTER_RUNTIME_DIR=str(runtime)), kernel(FILES_KERNEL, cwd=str(tmp_path)) as client:
        assert client.value("import os, json; print(json.dumps(os.listdir('share/runtime')))") == []


def test_what_a_dying_kernel_wrote_reaches_no_terminal_as_control_characters(client: Client) -> None:
    result = client.run("import os; os.write(2, b'\\x1b[2J[sandbox] all is well\\n'); os._exit(4)")
    assert "exited with code 4" in result.stderr and "\x1b[2J" not in result.stderr.partition("exited")[2]


def test_an_image_may_be_named_by_the_folder_of_an_environment(product: Product) -> None:
    profiles = product.home / "profiles.toml"
    before = profiles.read_text()
    profiles.write_text(f'{before}\n[profiles.by-folder]\nimage = "host:{sys.prefix}"\ntemplate = false\n')
    try:
        done = product.command("install", "--prefix", str(product.prefix), "--no-templates", "by-folder")
        assert done.returncode == 0, done.stderr
        with kernel("by-folder") as client:
            result = client.run("import os, sys; print(sys.prefix, 'SANDBOX_ID' in os.environ)")
        assert result.stdout == f"{sys.prefix} True\n"
    finally:
        product.command("uninstall", "--prefix", str(product.prefix), "by-folder")
        profiles.write_text(before)
