// Added to gVisor's package pkg/state/wire for a build from source; see sandbox_gateway/host/runsc_changes.py.

package wire

import "bufio"

// slabObjects is how many objects of one kind are made at once.
const slabObjects = 256

// ahead is what a Reader sees of its input before it is read, and the memory that it has in store.
//
// A saved sandbox's state is some hundred thousand numbers of mostly one byte, and as many small objects. gVisor calls
// three readers for each byte, and the allocator for each object.
type ahead struct {
	// source is the buffer that the input comes from; nil: there is none, and bytes are read one by one.
	source *bufio.Reader
	// seen is what is to come and in the buffer, or the one byte that was read.
	seen []byte
	// held is how many bytes the buffer had when it was looked into.
	held int

	structs    slab[Struct]
	refs       slab[Ref]
	slices     slab[Slice]
	interfaces slab[Interface]
	lists      slab[multipleObjects]
	objects    slab[Object]
}

// slab is a number of objects that are made at once and given out one by one.
type slab[T any] struct {
	all []T
	// kept and taken are how many are somebody's for good, and how many are given out.
	kept, taken int
}

func (s *slab[T]) take(n int) []T {
	if s.taken+n > len(s.all) {
		s.all, s.kept, s.taken = make([]T, max(n, slabObjects)), 0, 0
	}
	s.taken += n
	return s.all[s.taken-n : s.taken : s.taken]
}

// short returns the next number, where it is one byte that has been seen, as most are.
func (r *Reader) short() (Uint, bool) {
	if len(r.seen) == 0 || r.seen[0] >= 0x80 {
		return 0, false
	}
	u := Uint(r.seen[0])
	r.seen = r.seen[1:]
	return u, true
}

// nextByte returns the next byte of the input. It panics on error.
func (r *Reader) nextByte() byte {
	if len(r.seen) == 0 {
		r.look()
	}
	b := r.seen[0]
	r.seen = r.seen[1:]
	return b
}

// look sees some more of the input, at least one byte. It panics on error.
func (r *Reader) look() {
	if s, ok := r.Reader.(interface{ Buffer() *bufio.Reader }); ok && r.source == nil {
		r.source = s.Buffer()
	}
	r.Done()
	if r.source == nil {
		if n, err := r.Reader.Read(r.buf[:]); n != 1 {
			panic(err)
		}
		r.seen = r.buf[:]
		return
	}
	if _, err := r.source.Peek(1); err != nil {
		panic(err)
	}
	r.held = r.source.Buffered()
	r.seen, _ = r.source.Peek(r.held)
}

// Done leaves to the next one what has been seen of the input and not been read.
func (r *Reader) Done() {
	if r.source != nil {
		r.source.Discard(r.held - len(r.seen))
	}
	r.seen, r.held = nil, 0
}

// Read implements io.Reader.Read.
func (r *Reader) Read(p []byte) (int, error) {
	if n := copy(p, r.seen); n != 0 {
		r.seen = r.seen[n:]
		return n, nil
	}
	r.Done()
	return r.Reader.Read(p)
}

// list returns a list of that many objects.
func (r *Reader) list(length Uint) multipleObjects {
	return multipleObjects(r.objects.take(int(length)))
}

// Keep leaves what was loaded since the last call of this or of Drop to who has it.
func (r *Reader) Keep() {
	r.structs.kept, r.refs.kept, r.slices.kept = r.structs.taken, r.refs.taken, r.slices.taken
	r.interfaces.kept, r.lists.kept, r.objects.kept = r.interfaces.taken, r.lists.taken, r.objects.taken
}

// Drop says that nobody has any more what was loaded since the last call of this or of Keep.
func (r *Reader) Drop() {
	r.structs.taken, r.refs.taken, r.slices.taken = r.structs.kept, r.refs.kept, r.slices.kept
	r.interfaces.taken, r.lists.taken, r.objects.taken = r.interfaces.kept, r.lists.kept, r.objects.kept
}
