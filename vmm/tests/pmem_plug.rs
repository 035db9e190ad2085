//! Files in the guest's address space that come and go, with guests of a few instructions. What a real guest does with them
//! is seen in the lab.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod rig;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rig::{Api, EJECT_ALWAYS, SAY_X, SPIN, eventually};
use serde_json::Value;

/// A file of 1 MiB.
fn file(api: &Api, name: &str) -> PathBuf {
    let path = api.rig.path(name);
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

fn body(id: &str, path: &Path, read_only: bool) -> String {
    format!(r#"{{"id": {id:?}, "path_on_host": {path:?}, "read_only": {read_only}}}"#)
}

fn put(api: &Api, id: &str, path: &Path, read_only: bool) {
    api.put(&format!("/pmem/{id}"), &body(id, path, read_only));
}

fn delete(api: &Api, id: &str) {
    assert_eq!(api.ask("DELETE", &format!("/pmem/{id}"), ""), (204, String::new()), "{id}");
}

fn json(api: &Api, path: &str) -> Value {
    serde_json::from_str(&api.ask("GET", path, "").1).unwrap()
}

fn pmems(api: &Api) -> Vec<String> {
    let config = json(api, "/vm/config");
    config["pmem"].as_array().unwrap().iter().map(|pmem| pmem["id"].as_str().unwrap().to_owned()).collect()
}

/// Numbers of open files and threads, and how many mappings there are of files whose paths contain `words`.
fn holds(api: &Api, words: &str) -> [usize; 3] {
    let of_process = |name: &str| PathBuf::from(format!("/proc/{}/{name}", api.process.0.id()));
    let files = fs::read_dir(of_process("fd")).unwrap().count();
    let names = fs::read_dir(of_process("task")).unwrap().filter_map(|task| {
        // One that ends meanwhile has none.
        fs::read_to_string(task.unwrap().path().join("comm")).ok()
    });
    // From the first run of a vCPU on, KVM may have a thread of its own among ours.
    let threads = names.filter(|name| !name.starts_with("kvm-")).count();
    let maps = fs::read_to_string(of_process("maps")).unwrap();
    [files, threads, maps.lines().filter(|line| line.contains(words)).count()]
}

/// Waits until there is no more than `before`. The connection of a request is closed soon after its answer, so that there may
/// be one open file less.
fn nothing_is_left(api: &Api, words: &str, before: [usize; 3]) {
    eventually("nothing of it is left", || {
        let now = holds(api, words);
        (now[0] <= before[0] && now[1..] == before[1..]).then_some(())
    });
}

#[test]
fn a_file_that_comes_is_checked_as_one_of_the_start_is() {
    let api = Api::of_guest(&[&SAY_X, &SPIN]);
    let (root, boot, late, disk) = (file(&api, "root"), file(&api, "boot"), file(&api, "late"), file(&api, "disk"));
    api.put("/pmem/root", &body("root", &root, false).replace('}', r#", "root_device": true}"#));
    put(&api, "boot", &boot, false);
    api.put("/drives/d", &format!(r#"{{"drive_id": "d", "path_on_host": {disk:?}, "is_root_device": false}}"#));
    if !api.start() {
        return api.stop();
    }
    put(&api, "late", &late, true);
    put(&api, "same", &late, true);
    assert_eq!(pmems(&api), ["root", "boot", "late", "same"]);
    let (empty, huge, more) = (api.rig.path("empty"), api.rig.path("huge"), file(&api, "more"));
    fs::write(&empty, "").unwrap();
    // No processor addresses so much, and some file systems have none.
    let has_huge = File::create(&huge).unwrap().set_len(1 << 43).is_ok();
    let before = holds(&api, "more");
    for (id, path, words) in [
        ("late", &more, "Device ID in use"),
        ("more", &late, "are the same file"),
        ("more", &disk, "are the same file"),
        ("more", &api.rig.path("none"), "No such file"),
        ("more", &PathBuf::from("/etc/passwd"), "--visible"),
        ("more", &api.rig.fifo("fifo"), "is a FIFO"),
        ("more", &empty, "has 0 bytes"),
        ("more", &huge, if has_huge { "no room for" } else { "" }),
        ("m.re", &more, "is not a name"),
    ] {
        let said = api.refusal("PUT", &format!("/pmem/{id}"), &body(id, path, false));
        assert!(said.contains(words), "{words:?} is missing in {said:?}");
    }
    let said = api.refusal("PUT", "/pmem/more", &body("more", &more, false).replace('}', r#", "root_device": true}"#));
    assert!(said.starts_with("Pmem config error: Attempt to add pmem as a root device"), "{said}");
    nothing_is_left(&api, "more", before);

    assert!(api.refusal("DELETE", "/pmem/none", "").starts_with("Device not found"));
    assert!(api.refusal("DELETE", "/pmem/d", "").starts_with("Device not found"));
    assert!(api.refusal("DELETE", "/pmem/root", "").starts_with("Cannot unplug root device"));
    for id in ["late", "boot", "late"] {
        delete(&api, id);
        let status = json(&api, "/bedplate/status");
        assert_eq!(status["devices"][format!("pmem_{id}")]["unplugging"], true, "{status}");
        let said = api.refusal("PUT", &format!("/pmem/{id}"), &body(id, &more, false));
        assert!(said.contains("has not yet"), "{said}");
    }
    assert_eq!(pmems(&api), ["root", "boot", "late", "same"]);
    api.stop();
}

#[test]
fn what_has_gone_leaves_nothing_and_its_place_is_free() {
    let api = Api::of_guest(&[&EJECT_ALWAYS]);
    let (boot, late) = (file(&api, "boot-file"), file(&api, "late-file"));
    if !api.start() {
        return api.stop();
    }
    eventually("the guest works", || (json(&api, "/bedplate/status")["exits"]["port_write"] != 0).then_some(()));
    let before = holds(&api, "-file");
    for round in 0..20 {
        put(&api, "boot", &boot, round % 2 == 0);
        put(&api, "late", &late, round % 2 == 1);
        assert!(holds(&api, "-file")[2] >= 2);
        delete(&api, "boot");
        eventually("it is gone", || (pmems(&api) == ["late"]).then_some(()));
        assert!(json(&api, "/bedplate/status")["devices"].get("pmem_boot").is_none());
        delete(&api, "late");
        eventually("the other is gone", || pmems(&api).is_empty().then_some(()));
    }
    // More than half of the room that there is: only one has room at a time.
    let huge = api.rig.path("huge-file");
    if File::create(&huge).unwrap().set_len(300 << 30).is_ok() {
        let has_room = || api.ask("PUT", "/pmem/huge", &body("huge", &huge, true)).0 == 204;
        for _ in 0..2 {
            // Where addresses are short there is none for it at all.
            if has_room() {
                let said = api.refusal("PUT", "/pmem/more", &body("more", &huge, true));
                assert!(said.contains("no room for 307200 MiB"), "{said}");
                delete(&api, "huge");
            }
            eventually("it is gone", || pmems(&api).is_empty().then_some(()));
        }
    }
    nothing_is_left(&api, "-file", before);
    // Nobody minds any more.
    File::options().write(true).open(&boot).unwrap().set_len(0).unwrap();
    assert_eq!(json(&api, "/")["state"], "Running");
    api.stop();
}

#[test]
fn there_are_slots_for_so_many() {
    let api = Api::of_guest(&[&EJECT_ALWAYS]);
    let shared = file(&api, "shared-file");
    if !api.start() {
        return api.stop();
    }
    let before = holds(&api, "-file");
    // The balloon has one of 31.
    for round in 0..3 {
        (0..30).for_each(|number| put(&api, &format!("p{number}"), &shared, true));
        let full = holds(&api, "-file")[2];
        let said = api.refusal("PUT", "/pmem/more", &body("more", &shared, true));
        assert!(said.contains("no free PCI slot"), "{said}, round {round}");
        assert_eq!(holds(&api, "-file")[2], full, "what was refused is still mapped");
        (0..30).for_each(|number| delete(&api, &format!("p{number}")));
        eventually("all are gone", || pmems(&api).is_empty().then_some(()));
    }
    nothing_is_left(&api, "-file", before);
    api.stop();
}

#[test]
fn a_file_that_came_and_becomes_shorter_ends_the_vm() {
    for is_paused in [false, true] {
        let mut api = Api::of_guest(&[&SAY_X, &SPIN]);
        let (one, two) = (file(&api, "one"), file(&api, "two"));
        if !api.start() {
            return api.stop();
        }
        if is_paused {
            api.ask("PATCH", "/vm", r#"{"state": "Paused"}"#);
        }
        put(&api, "one", &one, false);
        put(&api, "two", &two, true);
        File::options().write(true).open(&two).unwrap().set_len(4096).unwrap();
        assert_eq!(api.process.wait(), 1);
        let detail = api.rig.exit().detail;
        assert!(detail.contains("pmem two: ") && detail.contains("from 1048576 to 4096 bytes"), "{detail}");
    }
}
