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
    let snapshot = store.snapshot().unwrap();
    assert_eq!(snapshot.all(&NODES).unwrap(), [node]);
    let events = snapshot.all(&EVENTS).unwrap();
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
        let copy = reopened.snapshot().unwrap();
        assert_eq!(copy.all(&NODES).unwrap().last().map(|n| n.number), Some(number));
        assert_eq!(copy.all(&EVENTS).unwrap().len(), copy.all(&NODES).unwrap().len());
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
    let snapshot = store.snapshot().unwrap();
    let events = snapshot.all(&EVENTS).unwrap();
    assert_eq!(events.len() as u64, KEPT_EVENTS);
    assert_eq!((events[0].number, events.last().unwrap().number), (6, KEPT_EVENTS + 5));
    let after = snapshot.after(&EVENTS, &rows::event_key(KEPT_EVENTS + 3)).unwrap();
    assert_eq!(after.iter().map(|e| e.number).collect::<Vec<_>>(), [KEPT_EVENTS + 4, KEPT_EVENTS + 5]);
    assert_eq!(snapshot.latest(&EVENTS, 1).unwrap()[0].number, KEPT_EVENTS + 5);
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
    let error = store.snapshot().unwrap().all(&NODES).unwrap_err();
    assert!(matches!(error, StoreError::Row { table: "nodes", .. }), "{error}");
    drop(store);
    assert!(matches!(Store::open(&path), Err(StoreError::Schema { .. })));

    fs::write(&path, "not a store").unwrap();
    let error = Store::open(&path).err().unwrap().to_string();
    assert!(error.contains("control.redb"), "{error}");
}
