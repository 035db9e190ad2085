//! Namespaces, and a root in which there is nothing but the directories of this VM.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change, mount_move, mount_remount,
};
use rustix::process::{chroot, getegid, geteuid, pivot_root};
use rustix::thread::UnshareFlags;

use super::{Access, Kept, SandboxError, unshare};

/// Where the new root is mounted while it is put together: a directory that every Linux has, and below which no VM's
/// files are.
const STAGE: &str = "/sys";

/// As many links as the kernel follows.
const MAX_LINKS: usize = 40;

/// Leaves the host's namespaces. Its files are still there.
pub(super) fn leave_namespaces() -> Result<(), SandboxError> {
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
            "allow user namespaces (`sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000`, or your \
             distribution's way)"
        };
        SandboxError::new("cannot get namespaces of its own", e, remedy)
    })?;
    if !is_root {
        keep_ids(uid, gid).map_err(|e| SandboxError::new("cannot set up the user namespace", e, "run as root"))?;
    }
    Ok(())
}

/// Leaves the host's file tree but for `dirs`.
pub(super) fn close(dirs: &[Kept]) -> Result<(), SandboxError> {
    if let Some(name) = dirs.iter().find(|kept| kept.dir == Path::new("/")).and_then(|kept| kept.names.first()) {
        return Err(SandboxError::new(
            format!("cannot keep {} visible", name.display()),
            io::Error::other("it is the root, and everything would be"),
            "put the VM's files and sockets into a directory of their own",
        ));
    }
    let here = std::env::current_dir().ok();
    let failed =
        |what: String| move |e: io::Error| SandboxError::new(what, e, "check that it is there and may be entered");
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(|e| failed("cannot leave the host's mounts".into())(e.into()))?;
    let stage = Path::new(STAGE);
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("sandbox", stage, "tmpfs", flags, c"size=64k,mode=755")
        .map_err(|e| failed(format!("cannot mount an empty root at {STAGE}"))(e.into()))?;
    // Ways first: below a directory that is shown they would be made on the host.
    let names = dirs.iter().flat_map(|kept| kept.names.iter().chain([&kept.dir])).chain(&here);
    for name in names {
        lead_to(stage, name).map_err(failed(format!("cannot make a way to {}", name.display())))?;
    }
    // Outer ones before what is in them, which they would hide.
    let mut dirs: Vec<_> = dirs.iter().collect();
    dirs.sort_by(|a, b| a.dir.cmp(&b.dir));
    for kept in dirs {
        show(stage, kept).map_err(failed(format!("cannot keep {} visible", kept.dir.display())))?;
    }
    enter(stage, here.as_deref()).map_err(failed("cannot leave the host's file tree".into()))
}

/// Inside of the user namespace the process has the numbers that it has outside.
fn keep_ids(uid: u32, gid: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Makes directories and links below `stage` by which `path` leads where it leads on the host. What is no directory there
/// any more has none here.
fn lead_to(stage: &Path, path: &Path) -> io::Result<()> {
    let mut rest: Vec<PathBuf> = vec![path.into()];
    let (mut at, mut links) = (PathBuf::from("/"), 0);
    while let Some(next) = rest.pop() {
        let mut parts = next.components();
        let Some(part) = parts.next() else { continue };
        rest.push(parts.as_path().into());
        match part {
            Component::RootDir => at = "/".into(),
            Component::ParentDir => drop(at.pop()),
            Component::CurDir | Component::Prefix(_) => {}
            Component::Normal(name) => {
                at.push(name);
                let place = stage.join(at.strip_prefix("/").unwrap_or(&at));
                let target = fs::read_link(&at).ok().filter(|_| links < MAX_LINKS);
                let made = match &target {
                    Some(target) => std::os::unix::fs::symlink(target, &place),
                    None => fs::DirBuilder::new().mode(0o755).create(&place),
                };
                made.or_else(|e| if e.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })?;
                if let Some(target) = target {
                    links += 1;
                    at.pop();
                    rest.push(target);
                }
            }
        }
    }
    Ok(())
}

/// Makes a directory, with all that is mounted in it, appear at its own path below `stage`.
fn show(stage: &Path, kept: &Kept) -> io::Result<()> {
    let place = stage.join(kept.dir.strip_prefix("/").unwrap_or(&kept.dir));
    mount_bind_recursive(&kept.dir, &place)?;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | had(&place)?;
    if kept.access == Access::Read {
        flags |= MountFlags::RDONLY;
    }
    Ok(mount_remount(&place, flags, c"")?)
}

/// What a mount says of times of access: a user namespace may not take that back.
fn had(place: &Path) -> io::Result<MountFlags> {
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
    // Of this mount only, whatever is mounted there.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY | MountFlags::BIND;
    mount_remount(stage, flags, c"")?;
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
