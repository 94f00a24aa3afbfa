// Added to gVisor's package pkg/cpuid for a build from source; see sandbox_gateway/host/runsc_changes.py.

//go:build amd64

package cpuid

// answered asks the processor each thing once. A sandbox asks it for every feature by itself, the same few leaves again
// and again, and in a virtual machine each time is one for its host.
type answered map[In]Out

// Query implements Function.Query.
func (a answered) Query(in In) Out {
	out, ok := a[in]
	if !ok {
		out = (&Native{}).Query(in)
		a[in] = out
	}
	return out
}
