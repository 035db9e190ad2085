//! Devices that come and go, with guests of a few instructions that are not as they should be. What a real guest does with
//! them is seen in the lab.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod rig;

use std::path::{Path, PathBuf};

use rig::{Api, EJECT_ALWAYS, Rig, SAY_X, SPIN, eventually, has_kvm};
use serde_json::Value;

fn disk(api: &Api, name: &str) -> PathBuf {
    let path = api.rig.path(name);
    std::fs::write(&path, [0; 4096]).unwrap();
    path
}

fn body(id: &str, path: &Path, root: bool) -> String {
    format!(r#"{{"drive_id": {id:?}, "path_on_host": {path:?}, "is_root_device": {root}}}"#)
}

fn json(api: &Api, path: &str) -> Value {
    serde_json::from_str(&api.ask("GET", path, "").1).unwrap()
}

fn drives(api: &Api) -> Vec<String> {
    let config = json(api, "/vm/config");
    config["drives"].as_array().unwrap().iter().map(|drive| drive["drive_id"].as_str().unwrap().to_owned()).collect()
}

fn delete(api: &Api, path: &str) {
    assert_eq!(api.ask("DELETE", path, ""), (204, String::new()), "{path}");
}

fn open_files(api: &Api) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", api.process.0.id())).unwrap().count()
}

#[test]
fn a_guest_that_never_answers_keeps_its_device() {
    let api = Api::of_guest(&[&SAY_X, &SPIN]);
    let (root, boot, late) = (disk(&api, "root"), disk(&api, "boot"), disk(&api, "late"));
    api.put("/drives/root", &body("root", &root, true));
    api.put("/drives/boot", &body("boot", &boot, false));
    if !api.start() {
        return api.stop();
    }
    api.put("/drives/late", &body("late", &late, false));
    // No new ring is permitted inside of the sandbox: the disk does without.
    let engine = body("ring", &disk(&api, "ring"), false).replace('}', r#", "io_engine": "Async"}"#);
    api.put("/drives/ring", &engine);
    assert_eq!(drives(&api), ["root", "boot", "late", "ring"]);
    for (id, path, is_root, words) in [
        ("late", &disk(&api, "more"), false, "Device ID in use"),
        ("more", &disk(&api, "more"), true, "A root block device already exists"),
        ("more", &late, false, "are the same file"),
        ("more", &api.rig.path("none"), false, "none"),
        ("more", &PathBuf::from("/etc/passwd"), false, "--visible"),
        ("m.re", &late, false, "is not a name"),
    ] {
        let said = api.refusal("PUT", &format!("/drives/{id}"), &body(id, path, is_root));
        assert!(said.contains(words), "{words:?} is missing in {said:?}");
    }
    let net = r#"{"iface_id": "n", "host_dev_name": "no-such-tap"}"#;
    assert!(api.refusal("PUT", "/network-interfaces/n", net).contains("--tap no-such-tap"));
    assert!(api.refusal("DELETE", "/drives/none", "").starts_with("Device not found"));
    assert!(api.refusal("DELETE", "/network-interfaces/late", "").starts_with("Device not found"));
    assert!(api.refusal("DELETE", "/drives/root", "").starts_with("Cannot unplug root device"));
    for id in ["late", "boot", "late"] {
        delete(&api, &format!("/drives/{id}"));
        let status = json(&api, "/bedplate/status");
        assert_eq!(status["devices"][format!("block_{id}")]["unplugging"], true, "{status}");
        assert!(status["devices"]["block_root"].get("unplugging").is_none(), "{status}");
        let said = api.refusal("PUT", &format!("/drives/{id}"), &body(id, &disk(&api, "more"), false));
        assert!(said.contains("has not yet"), "{said}");
    }
    assert_eq!(drives(&api), ["root", "boot", "late", "ring"]);
    api.stop();
}

#[test]
fn a_guest_that_lets_go_of_everything_loses_what_it_was_asked_for() {
    let api = Api::of_guest(&[&EJECT_ALWAYS]);
    let (boot, late) = (disk(&api, "boot"), disk(&api, "late"));
    api.put("/drives/boot", &body("boot", &boot, false));
    if !api.start() {
        return api.stop();
    }
    eventually("the guest works", || (json(&api, "/bedplate/status")["exits"]["port_write"] != 0).then_some(()));
    let before = open_files(&api);
    for _ in 0..20 {
        api.put("/drives/late", &body("late", &late, false));
        let writes = || json(&api, "/bedplate/status")["exits"]["port_write"].as_u64().unwrap();
        let start = writes();
        eventually("the guest lets go of it unasked", || (writes() > start + 10).then_some(()));
        assert_eq!(drives(&api), ["boot", "late"]);
        delete(&api, "/drives/late");
        eventually("it is gone", || (drives(&api) == ["boot"]).then_some(()));
        assert!(json(&api, "/bedplate/status")["devices"].get("block_late").is_none());
    }
    // The connection of a request is closed soon after its answer.
    eventually("everything is closed", || (open_files(&api) <= before).then_some(()));
    delete(&api, "/drives/boot");
    eventually("the last one is gone", || drives(&api).is_empty().then_some(()));
    api.stop();
}

#[test]
fn a_tap_that_shall_be_kept_has_to_be_there() {
    let rig = Rig::new(&[&SPIN]);
    if has_kvm() {
        let said = rig.refusal_with(&["--tap", "no-such-tap"], "");
        assert!(said.contains("--tap no-such-tap: there is no such tap device"), "{said}");
    }
}

#[test]
fn there_are_slots_for_so_many() {
    let api = Api::of_guest(&[&EJECT_ALWAYS]);
    let shared = disk(&api, "shared");
    if !api.start() {
        return api.stop();
    }
    let put = |number: u32| {
        let body = format!(
            r#"{{"drive_id": "d{number}", "path_on_host": {shared:?}, "is_root_device": false, "is_read_only": true}}"#
        );
        api.ask("PUT", &format!("/drives/d{number}"), &body)
    };
    // The balloon has one of 31.
    for round in 0..3 {
        for number in 0..30 {
            assert_eq!(put(number).0, 204, "{number} of round {round}");
        }
        let (status, said) = put(30);
        assert!(status == 400 && said.contains("no free PCI slot"), "{status} {said}");
        (0..30).for_each(|number| delete(&api, &format!("/drives/d{number}")));
        eventually("all are gone", || drives(&api).is_empty().then_some(()));
    }
    api.stop();
}
