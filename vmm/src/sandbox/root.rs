//! Namespaces, and a root in which there is nothing but the directories of this VM.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change, mount_move, mount_remount,
};
use rustix::process::{chroot, getegid, geteuid, pivot_root};
use rustix::thread::UnshareFlags;

use super::{Access, SandboxError, unshare};

/// Where the new root is mounted while it is put together: a directory that every Linux has, and below which no VM's
/// files are.
const STAGE: &str = "/sys";

/// Leaves the host's namespaces and file tree.
pub(super) fn close(dirs: &[(PathBuf, Access)]) -> Result<(), SandboxError> {
    let here = std::env::current_dir().ok();
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    let is_root = geteuid().is_root();
    if !is_root {
        flags |= UnshareFlags::NEWUSER;
    }
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    unshare(flags).map_err(|e| {
        let remedy = if is_root {
            "a container needs the capability SYS_ADMIN for it"
        } else {
            "allow user namespaces (`sysctl kernel.unprivileged_userns_clone=1`, or your distribution's way) or run as root"
        };
        SandboxError::new("cannot get namespaces of its own", e, remedy)
    })?;
    if !is_root {
        map_ourselves(uid, gid).map_err(|e| SandboxError::new("cannot set up the user namespace", e, "run as root"))?;
    }
    let failed =
        |what: String| move |e: io::Error| SandboxError::new(what, e, "check that it is there, or run as root");
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(|e| failed("cannot leave the host's mounts".into())(e.into()))?;
    let stage = Path::new(STAGE);
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("sandbox", stage, "tmpfs", flags, c"size=64k,mode=755")
        .map_err(|e| failed(format!("cannot mount an empty root at {STAGE}"))(e.into()))?;
    let mut dirs = dirs.to_vec();
    // Outer ones first, so that what is inside one is not hidden by it.
    dirs.sort();
    for (dir, access) in &dirs {
        show(stage, dir, *access, is_root).map_err(failed(format!("cannot keep {} visible", dir.display())))?;
    }
    enter(stage, here.as_deref()).map_err(failed("cannot leave the host's file tree".into()))
}

/// Inside, we are who we were outside.
fn map_ourselves(uid: u32, gid: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Makes `dir` appear at its own path below `stage`.
fn show(stage: &Path, dir: &Path, access: Access, is_root: bool) -> io::Result<()> {
    let place = stage.join(dir.strip_prefix("/").unwrap_or(dir));
    if !place.is_dir() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&place)?;
    }
    // Without privileges over the host, what is mounted below cannot be uncovered by leaving it away.
    if is_root {
        mount_bind(dir, &place)?
    } else {
        mount_bind_recursive(dir, &place)?
    };
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | kept(&place)?;
    if access == Access::Read {
        flags |= MountFlags::RDONLY;
    }
    Ok(mount_remount(&place, flags, c"")?)
}

/// What a mount says of times of access: a user namespace may not take that back.
fn kept(place: &Path) -> io::Result<MountFlags> {
    let there = statvfs(place)?.f_flag;
    let mut flags = MountFlags::empty();
    for (is, flag) in [
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
    ] {
        if there.contains(is) {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// Makes `stage` the root and lets go of the old one. `here` stays the working directory if it is to be seen.
fn enter(stage: &Path, here: Option<&Path>) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount_remount(stage, flags, c"size=64k,mode=755")?;
    std::env::set_current_dir(stage)?;
    match pivot_root(".", ".") {
        // The old root lies over the new one now.
        Ok(()) => rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)?,
        // The root is an initramfs, which cannot be left, only be covered.
        Err(Errno::INVAL) => {
            mount_move(".", "/")?;
            chroot(".")?;
        }
        Err(e) => return Err(e.into()),
    }
    std::env::set_current_dir("/")?;
    if let Some(here) = here {
        // Seen or not: relative paths mean the same as before, or nothing.
        let _unseen = std::env::set_current_dir(here);
    }
    Ok(())
}
