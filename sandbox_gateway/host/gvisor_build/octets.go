// Added to gVisor's package pkg/state for a build from source; see sandbox_gateway/host/runsc_changes.py.

package state

import (
	"reflect"

	"gvisor.dev/gvisor/pkg/state/wire"
)

var octet = reflect.TypeFor[byte]()

// encodeOctets encodes an array of bytes as a string; false: it is none. gVisor encodes an array element by element,
// each an object of its own, and every thread of a sandbox has its floating point registers in such an array: 11 KB
// of them on a processor with AMX.
func encodeOctets(obj reflect.Value, dest *wire.Object) bool {
	if obj.Type().Elem() != octet || !obj.CanInterface() {
		return false
	}
	octets := make([]byte, obj.Len())
	reflect.Copy(reflect.ValueOf(octets), obj)
	s := wire.String(octets)
	*dest = &s
	return true
}

// decodeOctets decodes what encodeOctets has encoded; false: it is a string, or an array as gVisor encodes it.
func decodeOctets(obj reflect.Value, encoded wire.Object) bool {
	s, ok := encoded.(*wire.String)
	if !ok || obj.Kind() != reflect.Array {
		return false
	}
	if obj.Type().Elem() != octet || obj.Len() != len(*s) {
		Failf("%d bytes were encoded, not a value of %v", len(*s), obj.Type())
	}
	reflect.Copy(obj, reflect.ValueOf([]byte(*s)))
	return true
}
