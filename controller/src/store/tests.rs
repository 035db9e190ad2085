use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::records::NodeNumber;

#[test]
fn what_was_changed_is_there_after_a_reopen_and_what_failed_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.redb");
    let store = Store::open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let node = store
        .change(|change| {
            let node = change.new_node()?;
            change.put_node(&node)?;
            change.event(7, node.number, "first")?;
            Ok::<_, StoreError>(node)
        })
        .unwrap();
    let refused: Result<(), StoreError> = store.change(|change| {
        let node = change.new_node()?;
        change.put_node(&node)?;
        change.event(8, node.number, "never")?;
        Err(StoreError::Schema { found: 9.into() })
    });
    assert!(refused.is_err());
    drop(store);

    let store = Store::open(&path).unwrap();
    assert_eq!(store.read(|s| s.all(&NODES)).unwrap(), [node]);
    let events = store.read(|s| s.all(&EVENTS)).unwrap();
    assert_eq!(events.iter().map(|e| (e.number, e.message.as_str())).collect::<Vec<_>>(), [(1, "first")]);
}

/// What kill -9 leaves is the file as it is at that moment, with nothing closed.
#[test]
fn a_copy_taken_at_any_moment_opens_with_whole_transactions() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("control.redb")).unwrap();
    for round in 0..20u64 {
        let number = store
            .change(|change| {
                let node = change.new_node()?;
                change.put_node(&node)?;
                change.event(round, node.number, "made")?;
                Ok::<_, StoreError>(node.number)
            })
            .unwrap();
        let copy = dir.path().join(format!("{round}.redb"));
        fs::copy(dir.path().join("control.redb"), &copy).unwrap();
        let reopened = Store::open(&copy).unwrap();
        let (nodes, events) = reopened.read(|s| Ok((s.all(&NODES)?, s.all(&EVENTS)?))).unwrap();
        assert_eq!(nodes.last().map(|n| n.number), Some(number));
        assert_eq!(events.len(), nodes.len());
    }
}

#[test]
fn numbers_are_not_given_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("control.redb")).unwrap();
    let make = || {
        store.change(|change| {
            let node = change.new_node()?;
            change.put_node(&node)?;
            Ok::<_, StoreError>(node.number)
        })
    };
    assert_eq!(make().unwrap(), NodeNumber(1));
    assert_eq!(make().unwrap(), NodeNumber(2));
    store.change(|change| change.remove_node(NodeNumber(2))).unwrap();
    assert_eq!(make().unwrap(), NodeNumber(3));
}

#[test]
fn the_log_keeps_the_newest_and_its_numbers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("control.redb")).unwrap();
    let write = |count: u64| {
        store.change(|change| (0..count).try_for_each(|n| change.event(n, "x", "y"))).unwrap();
    };
    write(KEPT_EVENTS + 5);
    let events = store.read(|s| s.all(&EVENTS)).unwrap();
    assert_eq!(events.len() as u64, KEPT_EVENTS);
    assert_eq!((events[0].number, events.last().unwrap().number), (6, KEPT_EVENTS + 5));
    let after = store.read(|s| s.after(&EVENTS, &rows::event_key(KEPT_EVENTS + 3))).unwrap();
    assert_eq!(after.iter().map(|e| e.number).collect::<Vec<_>>(), [KEPT_EVENTS + 4, KEPT_EVENTS + 5]);
    assert_eq!(store.read(|s| s.latest(&EVENTS, 1)).unwrap()[0].number, KEPT_EVENTS + 5);
}

#[test]
fn another_layout_a_damaged_row_and_a_foreign_file_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.redb");
    let store = Store::open(&path).unwrap();
    store
        .change(|change| {
            change.put(&Table::<&str>::new("nodes"), "0000000001", &"nonsense")?;
            change.set("schema", &2.into())
        })
        .unwrap();
    let error = store.read(|s| s.all(&NODES)).unwrap_err();
    assert!(matches!(error, StoreError::Row { table: "nodes", .. }), "{error}");
    drop(store);
    assert!(matches!(Store::open(&path), Err(StoreError::Schema { .. })));

    fs::write(&path, "not a store").unwrap();
    let error = Store::open(&path).err().unwrap().to_string();
    assert!(error.contains("control.redb"), "{error}");
}

#[test]
fn a_full_disk_loses_what_was_not_kept_and_nothing_else() {
    // A thread of its own, because what it mounts shall be seen by nobody else and end with it.
    std::thread::spawn(|| {
        let dir = tempfile::tempdir().unwrap();
        if !small_disk(dir.path()) {
            eprintln!("skipped: mounting a small file system takes root");
            return;
        }
        let store = Store::open(&dir.path().join("control.redb")).unwrap();
        let write = |n: u64| store.change(|change| change.event(n, "x", "y".repeat(1000)));
        write(1).unwrap();
        let hog = dir.path().join("hog");
        // As much as fits.
        let _ = fs::write(&hog, vec![1; DISK]);
        let kept = (2..10_000).take_while(|n| write(*n).is_ok()).count() + 1;
        let refused = write(0).unwrap_err().to_string();
        assert!(kept < 9_000 && refused.contains("store"), "{kept}: {refused}");

        fs::remove_file(&hog).unwrap();
        write(0).unwrap();
        let events = store.read(|s| s.all(&EVENTS)).unwrap();
        assert_eq!(events.len(), kept + 1, "all that was kept, and the one after");
        drop(store);
    })
    .join()
    .unwrap();
}

const DISK: usize = 16 << 20;

/// Mounts a small file system on `dir`, in a mount namespace of this thread's own.
fn small_disk(dir: &Path) -> bool {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::UnshareFlags;
    // SAFETY: only this thread's view of mounts and its working directory change; no descriptor or memory is unshared.
    let alone = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    // A mount must not reach the others.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    let size = std::ffi::CString::new(format!("size={DISK}")).unwrap();
    alone.is_ok()
        && mount_change("/", private).is_ok()
        && mount("tmpfs", dir, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).is_ok()
}
