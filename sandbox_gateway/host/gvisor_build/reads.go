// Added to gVisor's package pkg/sentry/state/stateio for a build from source; see sandbox_gateway/host/runsc_changes.py.

package stateio

import (
	"io"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/sentry/memmap"
)

const (
	partBytes = 1 << 20 // Bytes that are asked for at once, in the place of gVisor's 256 KiB.
	partsMax  = 8       // Parts that wait for their turn.
)

// memoryReader reads a pages file as FDReader does, but writes out of a mapping of that into the file behind the memory
// instead of reading into a mapping of this. A page that is written whole needs no page fault, is not cleared before,
// and is mapped when it is used, with those around it.
//
// It does so on one thread, where gVisor has 128. Nearly always the pages are in the page cache: what takes time is to
// find and to copy them, under a lock of the file that is written, which others would only turn around on, on the
// processors that the rest of the sandbox is loaded on.
type memoryReader struct {
	fd     int32
	pages  []byte
	into   []int
	parts  chan memoryPart
	read   chan Completion
	reader sync.WaitGroup
}

var _ AsyncReader = (*memoryReader)(nil)

type memoryFile int

// mappedMemory is a memory that is read into its mapping all the same: one in parts of which pages are to be large, or
// not, which only that knows; and where the file that is read cannot be mapped.
const mappedMemory = memoryFile(-1)

type memoryPart struct {
	id    int
	off   int64
	total uint64
	into  memoryFile
	frs   []memmap.FileRange
	maps  [][]byte // Where into is mappedMemory.
}

// newMemoryReader returns an AsyncReader of the given pages file, whose file descriptor it takes.
func newMemoryReader(fd int32) AsyncReader {
	r := &memoryReader{
		fd:    fd,
		pages: mapped(int(fd)),
		parts: make(chan memoryPart, partsMax),
		read:  make(chan Completion, partsMax),
	}
	r.reader.Go(r.work)
	return r
}

// mapped returns what the file holds; nothing where that cannot be had.
func mapped(fd int) []byte {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil || stat.Size == 0 {
		return nil
	}
	pages, err := unix.Mmap(fd, 0, int(stat.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		log.Infof("Reading memory without a mapping of its file: %v", err)
		return nil
	}
	return pages
}

func (r *memoryReader) work() {
	for part := range r.parts {
		read := r.copy
		if part.into == mappedMemory {
			read = r.fill
		}
		n, err := read(part)
		r.read <- Completion{ID: part.id, N: n, Err: err}
	}
}

// copy returns how many bytes of the part are in the memory, and why they are not all.
func (r *memoryReader) copy(part memoryPart) (uint64, error) {
	done := uint64(0)
	if part.off < 0 || uint64(part.off)+part.total > uint64(len(r.pages)) {
		return done, io.EOF
	}
	for _, fr := range part.frs {
		for begun := uint64(0); begun < fr.Length() && done < part.total; {
			from := r.pages[uint64(part.off)+done:][:min(fr.Length()-begun, part.total-done)]
			n, err := unix.Pwrite(int(part.into), from, int64(fr.Start+begun))
			if err == unix.EINTR {
				continue
			}
			if err == unix.EFAULT { // The file became shorter, or could not be read.
				return done, io.ErrUnexpectedEOF
			}
			if err != nil {
				return done, err
			}
			begun += uint64(n)
			done += uint64(n)
		}
	}
	return done, nil
}

// fill is copy by way of the memory's mapping.
func (r *memoryReader) fill(part memoryPart) (uint64, error) {
	done := uint64(0)
	for _, rest := range part.maps {
		for len(rest) > 0 {
			n, err := unix.Pread(int(r.fd), rest, part.off+int64(done))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return done, err
			}
			if n == 0 {
				return done, io.EOF
			}
			rest = rest[n:]
			done += uint64(n)
		}
	}
	return done, nil
}

// Close implements AsyncReader.Close.
func (r *memoryReader) Close() error {
	close(r.parts)
	r.reader.Wait()
	for _, fd := range r.into {
		unix.Close(fd)
	}
	if len(r.pages) > 0 {
		unix.Munmap(r.pages)
	}
	return unix.Close(int(r.fd))
}

// MaxReadBytes implements AsyncReader.MaxReadBytes.
func (*memoryReader) MaxReadBytes() uint64 { return partBytes }

// MaxRanges implements AsyncReader.MaxRanges.
func (*memoryReader) MaxRanges() int { return partBytes / unix.Getpagesize() }

// MaxParallel implements AsyncReader.MaxParallel.
func (*memoryReader) MaxParallel() int { return partsMax }

// NeedRegisterDestinationFD implements AsyncReader.NeedRegisterDestinationFD.
func (*memoryReader) NeedRegisterDestinationFD() bool { return true }

// RegisterDestinationFD implements AsyncReader.RegisterDestinationFD.
func (r *memoryReader) RegisterDestinationFD(fd int32, _ uint64, settings []ClientFileRangeSetting) (DestinationFile, error) {
	if len(settings) > 0 || len(r.pages) == 0 {
		return mappedMemory, nil
	}
	into, err := unix.Dup(int(fd)) // which the sandbox's filter of system calls allows, unlike fcntl(2)'s ways
	if err != nil {
		return nil, err
	}
	r.into = append(r.into, into)
	return memoryFile(into), nil
}

// AddRead implements AsyncReader.AddRead.
func (r *memoryReader) AddRead(id int, off int64, into DestinationFile, fr memmap.FileRange, dst []byte) {
	part := memoryPart{id: id, off: off, total: fr.Length(), into: into.(memoryFile), frs: []memmap.FileRange{fr}}
	if part.into == mappedMemory {
		part.maps = [][]byte{dst}
	}
	r.parts <- part
}

// AddReadv implements AsyncReader.AddReadv.
func (r *memoryReader) AddReadv(
	id int, off int64, total uint64, into DestinationFile, frs []memmap.FileRange, dsts []unix.Iovec) {
	part := memoryPart{id: id, off: off, total: total, into: into.(memoryFile), frs: frs}
	if part.into == mappedMemory {
		for _, dst := range dsts {
			part.maps = append(part.maps, SliceFromIovec(dst))
		}
	}
	r.parts <- part
}

// Wait implements AsyncReader.Wait.
func (r *memoryReader) Wait(cs []Completion, minCompletions int) ([]Completion, error) {
	for range minCompletions {
		cs = append(cs, <-r.read)
	}
	for {
		select {
		case c := <-r.read:
			cs = append(cs, c)
		default:
			return cs, nil
		}
	}
}
