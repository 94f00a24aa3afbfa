// Added to gVisor's package runsc, the program, for a build from source; see sandbox_gateway/host/runsc_changes.py.

// Go would look at the control group's limit of processors when a process begins, and keep its files open, in a sandbox
// too, which sets how many processors it uses itself.
//
//go:debug containermaxprocs=0

package main

import (
	"runtime"
	"runtime/debug"
	"time"
)

const (
	startingPercent = 400
	startingTime    = 10 * time.Second
	runningPercent  = 200
)

// While a sandbox is restored its heap grows from nothing to its full size, which with Go's default is collected at
// every doubling; and when a sandbox is saved, much is made that nobody keeps. Nothing but the environment could say
// that from outside, and runsc gives its sandboxes none. Nobody looks at a profile of the heap either, which Go takes
// along unless it is told not to.
func init() {
	runtime.MemProfileRate = 0
	debug.SetGCPercent(startingPercent)
	time.AfterFunc(startingTime, func() { debug.SetGCPercent(runningPercent) })
}
