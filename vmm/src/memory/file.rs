//! The file that guest RAM is: in memory, without a name, of pages of one size or another.

use std::fs::{self, File};
use std::io;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use super::{Pages, Sharing};

/// A file of `len` zeros, whose length nobody changes if others get it.
pub(super) fn create(len: u64, pages: Pages, sharing: Sharing) -> io::Result<File> {
    let sealable = if sharing == Sharing::Backends { MemfdFlags::ALLOW_SEALING } else { MemfdFlags::empty() };
    let named = |flags| -> io::Result<_> { Ok(memfd_create("guest-ram", flags | sealable | MemfdFlags::CLOEXEC)?) };
    let fd = match pages {
        Pages::Huge => named(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?,
        Pages::Host | Pages::Normal => named(MemfdFlags::empty())?,
        // A file on a file system cannot be sealed.
        Pages::Transparent if sharing == Sharing::Backends => named(MemfdFlags::empty())?,
        // What the host does not let us have is what advice is for, which it may refuse as well.
        Pages::Transparent => of_huge_pages().map_or_else(|_| named(MemfdFlags::empty()), Ok)?,
    };
    ftruncate(&fd, len)?;
    if sharing == Sharing::Backends {
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    }
    Ok(File::from(fd))
}

/// A file on a tmpfs of its own. One host setting decides for all files in memory whether they may be of huge pages, and is
/// `never` nearly everywhere; a mount has an option of its own. Nothing but the file holds the mount, which is in no tree.
fn of_huge_pages() -> io::Result<std::os::fd::OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // A page that would reach past the end is a small one: RAM need not be a multiple of 2 MiB.
    for (key, value) in [("huge", "within_size"), ("size", "0"), ("nr_inodes", "0"), ("mode", "0700")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok(openat(&mount, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?)
}

/// What the host gives to programs that do not ask, by its setting for memory of no file.
pub(super) fn host_gives() -> Pages {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if setting.is_ok_and(|setting| setting.contains("[always]")) { Pages::Transparent } else { Pages::Normal }
}
