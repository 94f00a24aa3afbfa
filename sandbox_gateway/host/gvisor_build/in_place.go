// Added to gVisor's package runsc/cmd/sentry/sentrycmd for a build from source; see sandbox_gateway/host/runsc_changes.py.

package sentrycmd

import (
	"fmt"
	"os"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/timing"
	"gvisor.dev/gvisor/runsc/boot"
	"gvisor.dev/gvisor/runsc/cmd/sandboxsetup"
	"gvisor.dev/gvisor/runsc/cmd/util"
	"gvisor.dev/gvisor/runsc/config"
)

// descriptors is /proc/self/fd, for the look at them right before the filter of system calls; nil where /proc is there
// until then. Whoever is forked before shares our table of descriptors, so that closing it there closes it for all.
var descriptors *os.File

// inPlace tells whether this process becomes the sandbox as it is. gVisor has its gofer do so; its sandbox without files
// of the host runs the program anew to be rid of its privileges, and has a third process keep them until /proc, which
// the other platforms and the host's network read at their start, is unmounted.
func (b *Boot) inPlace(conf *config.Config) bool {
	return b.setUpRoot && b.syncUsernsFD < 0 && !config.CgoEnabled && !conf.Rootless && !conf.EnableCoreTags &&
		conf.Platform == "systrap" && conf.Network != config.NetworkHost
}

// confine unmounts /proc, and leaves every thread of this process with no more than caps, for good.
func (b *Boot) confine(conf *config.Config, caps *specs.LinuxCapabilities, timer *timing.Timer) error {
	if !b.inPlace(conf) {
		return sandboxsetup.ApplyCapsAllThreads(caps, timer)
	}
	resolved, err := sandboxsetup.ResolveThreadCaps(caps, timer)
	if err != nil {
		return err
	}
	if descriptors, err = os.Open("/proc/self/fd"); err != nil {
		return err
	}
	sandboxsetup.UmountProcInProcess()
	return resolved.Apply(timer)
}

// checkDescriptors ends the process if it holds a directory that it was not given, as validateOpenFDs does.
func checkDescriptors(given []boot.FDMapping) {
	if err := refuseDirectories(given); err != nil {
		util.Fatalf("descriptors of the sandbox: %v", err)
	}
}

func refuseDirectories(given []boot.FDMapping) error {
	passed := map[int]bool{int(descriptors.Fd()): true}
	for _, mapping := range given {
		passed[mapping.Host] = true
	}
	names, err := descriptors.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil {
			return err
		}
		var stat unix.Stat_t
		switch err := unix.Fstat(fd, &stat); {
		case err == unix.EBADF: // Closed since.
		case err != nil:
			return fmt.Errorf("fstat(%d): %w", fd, err)
		case stat.Mode&unix.S_IFMT == unix.S_IFDIR && !passed[fd]:
			return fmt.Errorf("FD %d is a directory", fd)
		}
	}
	return descriptors.Close()
}
