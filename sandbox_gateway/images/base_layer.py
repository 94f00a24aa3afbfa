"""The root filesystem under a host environment: two layers.

- ``/usr``: a shell, the usual command line tools and the shared libraries they, interpreters and wheels need, taken
  from this machine, with time zones, certificates, fonts and terminal descriptions;
- ``/``: a few generated directories, symbolic links and files (its own ``/etc``), some kilobytes. What differs
  between environments, mount points and links that lead to an interpreter, is here, so that they share the first.

Nothing is taken from the host's ``/etc`` but public certificates and the tables of services, protocols and types.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.elf import closure, library_directories, read_elf
from sandbox_gateway.images.ldcache import ld_so_cache
from sandbox_gateway.images.store import Recipe
from sandbox_gateway.images.tree import Tree

RECIPE = "base-3"
HOME = "/home/jovyan"
VOLATILE = ("/tmp", "/run", "/dev", "/proc", "/sys", HOME)
"""Where a runtime mounts memory or devices: what the root layer has there is not seen."""
_ETC = "/share/sandbox_gateway/etc"
"""In the ``/usr`` layer: what comes from the host's ``/etc``; ``/etc`` holds links to it."""

COMMANDS: tuple[str, ...] = tuple(
    """
    [ arch awk b2sum base32 base64 basename basenc bash bc bunzip2 bzcat bzip2 c_rehash cat chgrp chmod chown cksum
    clear cmp column comm cp csplit curl cut date dd df diff diff3 dircolors dirname du echo ed egrep env expand
    expr factor false fgrep file find flock fmt fold free getconf getent getopt git grep groups gunzip gzip head
    hexdump hostname hostid iconv id infocmp install join jq kill ldd less link ln locale logname look ls lsblk
    lscpu lzma make mawk gawk md5sum mkdir mkfifo mknod mktemp more mv namei nano nice nl nohup nproc numfmt od
    openssl paste patch pathchk pgrep pinky pkill pmap pr printenv printf ps ptx pwd readlink realpath reset rev rm
    rmdir rsync runcon sdiff sed seq setsid sh sha1sum sha224sum sha256sum sha384sum sha512sum shred shuf sleep sort
    split sqlite3 stat stdbuf strings strace stty sum sync tac tail tar taskset tee test tic time timeout top touch
    tput tr tree true truncate tset tsort tty uname uncompress unexpand uniq unlink unlzma unxz unzip unzstd uptime
    users vdir vi vim.tiny watch wc wget which who whoami xargs xxd xz xzcat yes zcat zcmp zdiff zgrep zip zless
    zstd zstdcat dash busybox ldconfig nologin
    """.split()
)
"""Programs taken where the host has them."""

LIBRARIES: tuple[str, ...] = tuple(
    """
    libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libutil.so.1 libresolv.so.2 libnsl.so.1 libanl.so.1
    libBrokenLocale.so.1 libthread_db.so.1 libnss_files.so.2 libnss_dns.so.2 libnss_compat.so.2 libgcc_s.so.1
    libstdc++.so.6 libgomp.so.1 libatomic.so.1 libquadmath.so.0 libgfortran.so.5 libz.so.1 libbz2.so.1.0
    liblzma.so.5 libzstd.so.1 liblz4.so.1 libssl.so.3 libcrypto.so.3 libssl.so.1.1 libcrypto.so.1.1 libffi.so.8
    libffi.so.7 libffi.so.6 libsqlite3.so.0 libreadline.so.8 libhistory.so.8 libncurses.so.6 libncursesw.so.6
    libpanel.so.6 libpanelw.so.6 libtinfo.so.6 libform.so.6 libformw.so.6 libmenu.so.6 libuuid.so.1 libexpat.so.1
    libcrypt.so.1 libcrypt.so.2 libgdbm.so.6 libgdbm_compat.so.4 libdb-5.3.so libtirpc.so.3 libnsl.so.2
    libmpdec.so.3 libyaml-0.so.2 libxml2.so.2 libxslt.so.1 libfreetype.so.6 libfontconfig.so.1 libpng16.so.16
    libjpeg.so.62 libtiff.so.6 libwebp.so.7 libGL.so.1 libEGL.so.1 libGLdispatch.so.0 libX11.so.6 libXext.so.6
    libXrender.so.1 libSM.so.6 libICE.so.6 libglib-2.0.so.0 libgthread-2.0.so.0 libsndfile.so.1 libgmp.so.10
    libgsl.so.27 libnuma.so.1 libcap.so.2
    """.split()
)
"""Libraries taken where the host has them, with all that they need."""

_SHARES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("share/zoneinfo", ("right", "right/*", "posix", "posix/*", "*.zi", "*.list"), 16 << 20),
    ("share/terminfo", (), 8 << 20),
    ("lib/terminfo", (), 8 << 20),
    ("share/fontconfig", (), 4 << 20),
    ("share/fonts/truetype/dejavu", (), 24 << 20),
    ("share/fonts/truetype/liberation", (), 24 << 20),
    ("share/fonts/dejavu-sans-fonts", (), 24 << 20),
    ("share/fonts/dejavu-sans-mono-fonts", (), 24 << 20),
    ("share/git-core/templates", (), 4 << 20),
    ("share/tabset", (), 1 << 20),
    ("lib/git-core", ("*.pl", "git-svn", "git-send-email", "git-cvs*", "git-archimport", "git-p4"), 64 << 20),
    ("lib/locale/C.utf8", (), 4 << 20),
    ("libexec/git-core", (), 64 << 20),
)
"""Folders below ``/usr`` (path, patterns left out, most bytes that are believed to be worth it)."""

_ETC_FILES = ("services", "protocols", "mime.types", "ethertypes", "rpc")


def usr_fingerprint(needs: Sequence[str], programs: Sequence[str], extra: Sequence[str]) -> str:
    """Changes when the host's packages do, or what an environment asks for; well below a millisecond.

    Package managers touch their database, the loader's cache and the directories themselves.
    """
    found = hashlib.sha256(f"{RECIPE} {' '.join(needs)}\n{' '.join(extra)}\n".encode())
    places = ["/usr/bin", "/usr/lib", "/etc/ld.so.cache", "/etc/ssl/certs", "/usr/share/zoneinfo", *programs]
    places += [d for d in library_directories() if d.startswith(("/usr/", "/lib"))]
    for path in places:
        try:
            state = os.stat(path)
        except OSError:
            continue
        found.update(os.fsencode(f"{path} {state.st_mtime_ns} {state.st_size if os.path.isfile(path) else 0}\n"))
    return found.hexdigest()


def build_usr(needs: Iterable[str], programs: Iterable[str], directories: Iterable[str]) -> Recipe:
    """The ``/usr`` layer.

    ``needs``: names of libraries that the environment wants beyond :data:`LIBRARIES`; ``programs``: paths of a system
    Python; ``directories``: mount points below ``/usr``. Raises ``image_failed`` on a machine without a shell.
    """
    usr = _Usr()
    shell = usr.command("sh")
    if not shell:
        raise SandboxGatewayError("image_failed", "this machine has no /bin/sh to put into the base layer")
    for name in COMMANDS:
        usr.command(name)
    for path in programs:
        usr.path(path)
    for folder, left_out, most in _SHARES:
        usr.share(folder, left_out, most)
    usr.gconv()
    libraries = closure(usr.programs, [*LIBRARIES, *needs], usr.machine)
    for name, path in libraries.files.items():
        usr.library(name, path)
    usr.cache(libraries.files)
    usr.etc()
    for path in directories:
        usr.tree.directory(path.removeprefix("/usr"))
    for path in ("bin", "sbin", "lib", "local/bin", "local/lib", "local/share", "share", "src"):
        usr.tree.directory(path)
    wanted = set(needs)
    return Recipe(usr.tree, {"missing": sorted(wanted & libraries.missing), "libraries": len(libraries.files)})


class _Usr:
    """Puts files of the host into a ``/usr`` tree, whether or not the host has merged ``/bin`` into it."""

    def __init__(self) -> None:
        self.tree = Tree()
        self.programs: list[str] = []
        own = read_elf(os.path.realpath("/bin/sh"))
        self.machine = own.machine if own is not None else None
        libc = closure((), ["libc.so.6"], self.machine).files.get("libc.so.6", "/usr/lib/libc.so.6")
        self.libraries = _place(os.path.realpath(libc)) or "/lib/libc.so.6"
        if own is not None and own.interpreter:
            self.path(own.interpreter)

    def command(self, name: str) -> bool:
        for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
            path = f"{folder}/{name}"
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return self.path(path)
        return False

    def path(self, path: str) -> bool:
        """Add a program or library under its name; its real file as well, with a link from one to the other."""
        real = os.path.realpath(path)
        target, name = (
            _place(real),
            _place(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))),
        )
        if name is None or not os.path.isfile(real):
            return False
        if target is None:
            target = name
        if self.tree.get(target) is None and not self.tree.host_file(target, real):
            return False
        # /lib64/ld-linux... is a name that programs carry in them: the directory's own name must exist as well.
        for alias in {name, _place(path) or name}:
            if alias != target and self.tree.get(alias) is None:
                self.tree.symlink(alias, os.path.relpath(target, os.path.dirname(alias)))
        self.programs.append(real)
        return True

    def library(self, name: str, path: str) -> None:
        real = os.path.realpath(path)
        folder = os.path.dirname(self.libraries)
        target = _place(real) or f"{folder}/{os.path.basename(real)}"
        if self.tree.get(target) is None:
            self.tree.host_file(target, real)
        # The image has no loader cache, so a library must be found in one of the loader's own directories.
        at_default = f"{folder}/{name}"
        if at_default != target and self.tree.get(at_default) is None:
            self.tree.symlink(at_default, os.path.relpath(target, folder))

    def share(self, folder: str, left_out: tuple[str, ...], most: int) -> None:
        for source in (f"/usr/{folder}", f"/{folder}"):
            real = os.path.realpath(source)
            if not os.path.isdir(real) or (_place(f"{real}/") or "").rstrip("/") != f"/{folder}":
                continue
            part = Tree()
            part.host_tree("/", real, lambda p, is_dir: not any(fnmatch.fnmatch(p, pattern) for pattern in left_out))
            if part.total_bytes() > most:
                continue
            self.tree.host_tree(
                folder, real, lambda p, is_dir: not any(fnmatch.fnmatch(p, pattern) for pattern in left_out)
            )
            if folder.endswith("git-core"):
                self.programs += [node.source for _, node in part if node.source and node.mode & 0o111]
            return

    def cache(self, names: Iterable[str]) -> None:
        """The loader's cache; every library has its name in the loader's own directory, see :meth:`library`."""
        folder = os.path.dirname(self.libraries)
        known = {name: f"/usr{folder}/{name}" for name in names if self.tree.get(f"{folder}/{name}") is not None}
        content = ld_so_cache(known, self.machine)
        if content is not None:
            self.tree.file(f"{_ETC}/ld.so.cache", content)

    def gconv(self) -> None:
        folder = os.path.join(os.path.dirname(self.libraries), "gconv")
        source = f"/usr{folder}" if os.path.isdir(f"/usr{folder}") else folder
        if os.path.isdir(source):
            self.tree.host_tree(folder, source)

    def etc(self) -> None:
        for name in _ETC_FILES:
            if os.path.isfile(f"/etc/{name}"):
                self.tree.host_file(f"{_ETC}/{name}", os.path.realpath(f"/etc/{name}"))
        if os.path.isdir("/etc/fonts"):
            self._dereferenced(f"{_ETC}/fonts", "/etc/fonts", ("*.conf", "README"))
        self._dereferenced(f"{_ETC}/ssl/certs", "/etc/ssl/certs", ("*.pem", "*.crt", "*.[0-9]"))
        for bundle in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"):
            if os.path.isfile(bundle):
                self.tree.host_file(f"{_ETC}/ssl/certs/ca-certificates.crt", os.path.realpath(bundle))
                break
        self.tree.directory(f"{_ETC}/ssl")
        self.tree.symlink(f"{_ETC}/ssl/cert.pem", "certs/ca-certificates.crt")
        if os.path.isfile("/etc/ssl/openssl.cnf"):
            self.tree.host_file(f"{_ETC}/ssl/openssl.cnf", os.path.realpath("/etc/ssl/openssl.cnf"))
        # OpenSSL looks in its own directory; every distribution names another one.
        for folder in ("lib/ssl", "lib64/ssl"):
            if folder.startswith("lib64") and not os.path.isdir("/usr/lib64"):
                continue
            for name in ("certs", "openssl.cnf", "cert.pem"):
                self.tree.symlink(f"{folder}/{name}", f"/etc/ssl/{name}")

    def _dereferenced(self, destination: str, source: str, patterns: tuple[str, ...]) -> None:
        for folder, _, names in os.walk(source):
            for name in names:
                path = os.path.join(folder, name)
                real = os.path.realpath(path)
                if os.path.isfile(real) and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                    self.tree.host_file(os.path.join(destination, os.path.relpath(path, source)), real)


def build_root(
    directories: Iterable[str], links: Mapping[str, str], kernel_uid: int = 1000, agent_uid: int = 64999
) -> Tree:
    """The ``/`` layer: generated; ``directories`` are mount points, ``links`` symbolic links to add where absent.

    ``/home/jovyan`` is writable for everybody and belongs to ``kernel_uid``: the image may serve other uids too.
    """
    tree = Tree()
    skeleton(tree, kernel_uid, agent_uid)
    for name in ("bin", "sbin", *sorted(n for n in os.listdir("/") if n.startswith("lib") and os.path.isdir(f"/{n}"))):
        tree.symlink(f"/{name}", f"usr/{name}")
    for name in ("ssl", "fonts", "ld.so.cache", *_ETC_FILES):
        tree.symlink(f"/etc/{name}", f"/usr{_ETC}/{name}")
    tree.symlink("/etc/terminfo", "/usr/share/terminfo")
    tree.directory("/usr")
    for path in directories:
        if not path.startswith("/usr/"):
            tree.directory(path)
    for path, target in links.items():
        if not path.startswith("/usr/") and tree.get(path) is None:
            parent = tree.get(os.path.dirname(path))
            if parent is None or parent.is_dir:
                tree.symlink(path, target)
    return tree


def skeleton(tree: Tree, kernel_uid: int = 1000, agent_uid: int = 64999) -> None:
    """Give ``tree`` the directories a sandbox needs and an ``/etc`` of its own."""
    plain = "proc sys dev dev/shm run etc root var/log var/lib mnt media srv opt/agent"
    wanted = [(path, 0o755, 0) for path in plain.split()]
    wanted += [("tmp", 0o1777, 0), ("var/tmp", 0o1777, 0), (HOME, 0o777, kernel_uid)]
    for path, mode, owner in wanted:
        # In a tree that is not ours a parent may be a symbolic link: then its target's side is good enough.
        with contextlib.suppress(ValueError):
            tree.directory(path, mode, owner, owner)
    for path, target in (("/var/run", "/run"), ("/var/lock", "/run/lock")):
        if tree.get(path) is None:
            tree.symlink(path, target)
    for path, content in etc_files(kernel_uid, agent_uid).items():
        tree.remove(path)
        tree.file(path, content)
    for path in ("/etc/shadow", "/etc/gshadow", "/etc/shadow-", "/etc/gshadow-", "/etc/passwd-", "/etc/group-"):
        tree.remove(path)


def etc_files(kernel_uid: int = 1000, agent_uid: int = 64999) -> dict[str, str]:
    """The generated files. The kernel's user is called ``jovyan`` whatever its uid, unless it is 0."""
    uid = kernel_uid if kernel_uid else 1000
    users = [("root", 0, HOME, "/bin/bash"), ("jovyan", uid, HOME, "/bin/bash")]
    if uid != 1000:
        users.append(("jovyan1000", 1000, HOME, "/bin/bash"))
    users += [("agent", agent_uid, "/", "/usr/sbin/nologin"), ("nobody", 65534, "/nonexistent", "/usr/sbin/nologin")]
    known: dict[int, tuple[str, int, str, str]] = {}
    for user in users:
        known.setdefault(user[1], user)
    users = list(known.values())
    groups = [(name if name != "nobody" else "nogroup", gid) for name, gid, _, _ in users] + [("tty", 5)]
    hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    switch = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n"
    return {
        "/etc/passwd": "".join(f"{name}:x:{uid}:{uid}:{name}:{home}:{shell}\n" for name, uid, home, shell in users),
        "/etc/group": "".join(f"{name}:x:{gid}:\n" for name, gid in groups),
        "/etc/hosts": hosts,
        "/etc/hostname": "sandbox\n",
        "/etc/nsswitch.conf": switch,
        "/etc/resolv.conf": "",
        "/etc/machine-id": "",
        "/etc/localtime": _UTC,
        "/etc/timezone": "Etc/UTC\n",
        "/etc/shells": "/bin/sh\n/bin/bash\n",
        "/etc/profile": 'export PATH="${PATH:-/usr/local/bin:/usr/bin:/bin}"\n',
        "/etc/os-release": _os_release(),
        "/etc/gitconfig": "[safe]\n\tdirectory = *\n",
    }


_UTC = "TZif2" + "\0" * 15 + "\0\0\0\0" * 4 + "\0\0\0\1\0\0\0\4" + "\0" * 6 + "UTC\0"
_UTC = _UTC + _UTC + "\nUTC0\n"
"""``/etc/localtime`` for UTC: the host's zone is nobody's business (RFC 8536, version 2, one type, no transitions)."""


def _os_release() -> str:
    try:
        facts = platform.freedesktop_os_release()
    except OSError:
        facts = {}
    keys = ("NAME", "VERSION", "ID", "ID_LIKE", "VERSION_ID", "PRETTY_NAME")
    return "".join(f'{key}="{facts[key]}"\n' for key in keys if key in facts) or 'ID="linux"\nNAME="Linux"\n'


def _place(path: str) -> str | None:
    """Where a host path belongs in the ``/usr`` tree; None for what lies elsewhere."""
    if path.startswith("/usr/"):
        return path.removeprefix("/usr")
    if path.split("/")[1] in ("bin", "sbin") or path.startswith("/lib"):
        return path
    return None
