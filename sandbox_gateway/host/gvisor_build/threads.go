// Added to gVisor's package runsc/cmd/sandboxsetup for a build from source; see sandbox_gateway/host/runsc_changes.py.

package sandboxsetup

import (
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"
)

// noNewPrivileges keeps every thread, and whatever that begins, from getting a capability with a program that it runs;
// false where it cannot. That is what an empty bounding set is for as well, but that one takes a stop of all threads for
// each of 41 capabilities, and gVisor sets this anyhow with its filter of system calls.
func noNewPrivileges() bool {
	if err := allThreadsPrctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		log.Warningf("no_new_privs: %v", err)
		return false
	}
	return true
}
