// Added to gVisor's package pkg/sentry/fsimpl/erofs for a build from source; see sandbox_gateway/host/runsc_changes.py.

package erofs

import (
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
)

var _ vfs.FilesystemImplSaveRestoreExtension = (*filesystem)(nil)

// PrepareSave implements vfs.FilesystemImplSaveRestoreExtension.PrepareSave. Names that were looked up once and that
// nothing has open are found again in the image, in less time than every sandbox restored would take to read them.
func (fs *filesystem) PrepareSave(ctx context.Context) error {
	fs.evictAllCachedDentries(ctx)
	return nil
}

// BeforeResume implements vfs.FilesystemImplSaveRestoreExtension.BeforeResume.
func (*filesystem) BeforeResume(context.Context) {}

// CompleteRestore implements vfs.FilesystemImplSaveRestoreExtension.CompleteRestore.
func (*filesystem) CompleteRestore(context.Context, vfs.CompleteRestoreOptions) error {
	return nil
}
