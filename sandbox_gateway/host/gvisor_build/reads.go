// Added to gVisor's package pkg/sentry/state/stateio for a build from source; see sandbox_gateway/host/runsc_build.py.

package stateio

import (
	"io"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/memmap"
)

const pieceBytes = 64 << 10

// parallelReads is how many parts of a saved sandbox's memory are read at once, in the place of gVisor's 128. Nearly
// always it comes out of the page cache: what takes time is the processors that find and copy the pages, and beyond
// two reads for each the parts only get into each other's way, and into that of what the sandbox waits for.
var parallelReads = min(pagesFileFDDefaultMaxParallel, 2*runtime.NumCPU())

// memoryReader reads a pages file as FDReader does, but writes what it has read into the file behind the memory instead
// of reading into a mapping of that. A page that is written whole needs no page fault, is not cleared before, and is
// mapped when it is used, with those around it.
type memoryReader struct {
	fd      int32
	into    []int
	parts   chan memoryPart
	read    chan Completion
	readers sync.WaitGroup
}

var _ AsyncReader = (*memoryReader)(nil)

type memoryFile int

type memoryPart struct {
	id    int
	off   int64
	total uint64
	into  int
	frs   []memmap.FileRange
}

// newMemoryReader returns an AsyncReader of the given pages file, whose file descriptor it takes.
func newMemoryReader(fd int32) AsyncReader {
	r := &memoryReader{
		fd:    fd,
		parts: make(chan memoryPart, parallelReads),
		read:  make(chan Completion, parallelReads),
	}
	for range parallelReads {
		r.readers.Go(r.work)
	}
	return r
}

func (r *memoryReader) work() {
	var piece []byte
	for part := range r.parts {
		if piece == nil {
			piece = make([]byte, pieceBytes)
		}
		n, err := r.copy(part, piece)
		r.read <- Completion{ID: part.id, N: n, Err: err}
	}
}

// copy returns how many bytes of the part are in the memory, and why they are not all.
func (r *memoryReader) copy(part memoryPart, piece []byte) (uint64, error) {
	done := uint64(0)
	frs, begun := part.frs, uint64(0)
	for done < part.total {
		got, err := unix.Pread(int(r.fd), piece[:min(uint64(len(piece)), part.total-done)], part.off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		if got == 0 {
			return done, io.EOF
		}
		for rest := piece[:got]; len(rest) > 0; {
			if begun == frs[0].Length() {
				frs, begun = frs[1:], 0
			}
			n, err := unix.Pwrite(part.into, rest[:min(uint64(len(rest)), frs[0].Length()-begun)], int64(frs[0].Start+begun))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return done, err
			}
			rest = rest[n:]
			begun += uint64(n)
			done += uint64(n)
		}
	}
	return done, nil
}

// Close implements AsyncReader.Close.
func (r *memoryReader) Close() error {
	close(r.parts)
	r.readers.Wait()
	for _, fd := range r.into {
		unix.Close(fd)
	}
	return unix.Close(int(r.fd))
}

// MaxReadBytes implements AsyncReader.MaxReadBytes.
func (*memoryReader) MaxReadBytes() uint64 { return pagesFileFDDefaultMaxIOBytes }

// MaxRanges implements AsyncReader.MaxRanges.
func (*memoryReader) MaxRanges() int { return pagesFileFDDefaultMaxIOBytes / unix.Getpagesize() }

// MaxParallel implements AsyncReader.MaxParallel.
func (*memoryReader) MaxParallel() int { return parallelReads }

// NeedRegisterDestinationFD implements AsyncReader.NeedRegisterDestinationFD.
func (*memoryReader) NeedRegisterDestinationFD() bool { return true }

// RegisterDestinationFD implements AsyncReader.RegisterDestinationFD.
func (r *memoryReader) RegisterDestinationFD(fd int32, _ uint64, _ []ClientFileRangeSetting) (DestinationFile, error) {
	into, err := unix.Dup(int(fd)) // which the sandbox's filter of system calls allows, unlike fcntl(2)'s ways
	if err != nil {
		return nil, err
	}
	r.into = append(r.into, into)
	return memoryFile(into), nil
}

// AddRead implements AsyncReader.AddRead.
func (r *memoryReader) AddRead(id int, off int64, into DestinationFile, fr memmap.FileRange, _ []byte) {
	r.AddReadv(id, off, fr.Length(), into, []memmap.FileRange{fr}, nil)
}

// AddReadv implements AsyncReader.AddReadv.
func (r *memoryReader) AddReadv(
	id int, off int64, total uint64, into DestinationFile, frs []memmap.FileRange, _ []unix.Iovec) {
	r.parts <- memoryPart{id: id, off: off, total: total, into: int(into.(memoryFile)), frs: frs}
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
