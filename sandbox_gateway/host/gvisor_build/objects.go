// Added to gVisor's package pkg/state for a build from source; see sandbox_gateway/host/runsc_changes.py.

package state

import (
	"reflect"
	"unsafe"
)

const objectsAtOnce = 64

// objects is what a decodeState makes tens of thousands of.
type objects struct {
	room   []objectDecodeState
	tables map[conversion]unsafe.Pointer
}

// conversion is one of a pointer to an interface.
type conversion struct {
	from, to reflect.Type
}

// next returns one of many that were made at once.
func (o *objects) next() *objectDecodeState {
	if len(o.room) == 0 {
		o.room = make([]objectDecodeState, objectsAtOnce)
	}
	ods := &o.room[0]
	o.room = o.room[1:]
	return ods
}

// setInterface is to.Set(v). Each time, reflect compares the names of all methods of the interface and of what is set;
// here the table that this comes to, the first word of an interface with methods, is remembered for each two types. The
// second word is the pointer.
func (o *objects) setInterface(to, v reflect.Value) {
	if to.Kind() != reflect.Interface || !to.CanAddr() || to.NumMethod() == 0 || v.Kind() != reflect.Pointer {
		to.Set(v)
		return
	}
	words := (*[2]unsafe.Pointer)(to.Addr().UnsafePointer())
	of := conversion{v.Type(), to.Type()}
	if table, ok := o.tables[of]; ok {
		words[0], words[1] = table, v.UnsafePointer()
		return
	}
	to.Set(v)
	if o.tables == nil {
		o.tables = make(map[conversion]unsafe.Pointer)
	}
	o.tables[of] = words[0]
}
