// Added to gVisor's package pkg/sentry/state/stateio for a build from source; see sandbox_gateway/host/runsc_build.py.

package stateio

import "runtime"

// parallelReads is how many parts of a saved sandbox's memory are read at once, in the place of gVisor's 128. Nearly
// always it comes out of the page cache: what takes time is the processors that find and copy the pages, and beyond
// two reads for each the parts only get into each other's way, and into that of what the sandbox waits for.
var parallelReads = min(pagesFileFDDefaultMaxParallel, 2*runtime.NumCPU())
