//! The HTTP API of a process, as clients of Firecracker use it and as nobody should. Where there is no KVM, what needs a
//! VM that runs is left to the lab tests.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod rig;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rig::{Api, RESET, Rig, Running, SAY_X, SPIN, START, eventually, has_kvm, request, vmm};

const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";

fn drive(path: &Path) -> String {
    format!(r#"{{"drive_id": "d", "path_on_host": {path:?}, "is_root_device": false, "is_read_only": true}}"#)
}

#[test]
fn each_request_has_its_time() {
    let api = Api::new();
    let disk = api.rig.path("disk");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let snapshot = r#"{"snapshot_path": "s", "mem_file_path": "m"}"#;
    let late = [
        ("PATCH", "/vm", r#"{"state": "Paused"}"#),
        ("PATCH", "/drives/d", r#"{"drive_id": "d"}"#),
        ("PATCH", "/network-interfaces/n", r#"{"iface_id": "n"}"#),
        ("PATCH", "/pmem/p", r#"{"id": "p"}"#),
        ("DELETE", "/pmem/p", ""),
        ("PATCH", "/balloon", r#"{"amount_mib": 1}"#),
        ("GET", "/balloon/statistics", ""),
        ("PATCH", "/balloon/hinting/start", ""),
        ("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 0}"#),
        ("DELETE", "/drives/d", ""),
        ("GET", "/bedplate/vcpus", ""),
        ("PUT", "/bedplate/vcpus", r#"{"count": 2}"#),
        ("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#),
        ("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#),
        ("PUT", "/snapshot/create", snapshot),
        ("PUT", "/bedplate/core-dump", r#"{"path": "p"}"#),
        ("PATCH", "/bedplate/console", r#"{"columns": 1, "rows": 1}"#),
    ];
    for (method, path, body) in late {
        assert_eq!(api.refusal(method, path, body), BEFORE, "{path}");
    }
    assert!(
        api.refusal("PUT", "/snapshot/load", snapshot).starts_with("Load snapshot error: snapshots are not offered")
    );
    let early = [
        (
            "/machine-config",
            r#"{"vcpu_count": 2, "mem_size_mib": 64, "smt": true, "track_dirty_pages": true}"#.to_owned(),
        ),
        ("/cpu-config", r#"{"cpuid_modifiers": [], "msr_modifiers": []}"#.to_owned()),
        ("/drives/d", drive(&disk)),
        ("/pmem/p", format!(r#"{{"id": "p", "path_on_host": {disk:?}, "read_only": true}}"#)),
        ("/vsock", format!(r#"{{"guest_cid": 3, "uds_path": {:?}}}"#, api.rig.path("v"))),
        ("/entropy", "{}".to_owned()),
        ("/bedplate/console", format!(r#"{{"socket": {:?}}}"#, api.rig.path("hvc"))),
        ("/balloon", r#"{"amount_mib": 1, "deflate_on_oom": true}"#.to_owned()),
        ("/hotplug/memory", r#"{"total_size_mib": 128}"#.to_owned()),
        ("/serial", "{}".to_owned()),
        ("/logger", format!(r#"{{"log_path": {:?}, "level": "INFO"}}"#, api.rig.path("messages"))),
        ("/metrics", format!(r#"{{"metrics_path": {:?}, "properties": {{"a": "b"}}}}"#, api.rig.path("metrics"))),
    ];
    for (path, body) in &early {
        api.put(path, body);
        // Again: the later one is taken.
        api.put(path, body);
    }
    let (_, config) = api.ask("GET", "/vm/config", "");
    assert!(config.contains(r#""smt":true"#) && config.contains(r#""cpu-config":{"#), "{config}");
    if !api.start() {
        return api.stop();
    }
    for (path, body) in early.iter().filter(|(path, _)| !["/drives/d", "/pmem/p"].contains(path)) {
        assert_eq!(api.refusal("PUT", path, body), AFTER, "{path}");
    }
    assert_eq!(api.refusal("PUT", "/actions", START), AFTER);
    assert!(api.refusal("PUT", "/snapshot/create", snapshot).starts_with("Create snapshot error"));
    api.put("/actions", r#"{"action_type": "FlushMetrics"}"#);
    let line = std::fs::read_to_string(api.rig.path("metrics")).unwrap();
    assert!(line.contains("utc_timestamp_ms") && line.contains(r#""properties":{"a":"b"}"#), "{line}");
    assert!(!line.contains(r#""id""#), "{line}");
    let log = std::fs::read_to_string(api.rig.path("messages")).unwrap();
    assert!(log.contains("[one:main] the VM runs"), "{log}");
    api.stop();
}

#[test]
fn a_disk_gets_another_file_while_the_vm_runs() {
    let api = Api::new();
    let (disk, other) = (api.rig.path("disk"), api.rig.path("other"));
    std::fs::write(&disk, [0; 4096]).unwrap();
    std::fs::write(&other, [0; 8192]).unwrap();
    api.put("/drives/d", &drive(&disk));
    if !api.start() {
        return api.stop();
    }
    let patch = |path: &Path| format!(r#"{{"drive_id": "d", "path_on_host": {path:?}}}"#);
    assert_eq!(api.ask("PATCH", "/drives/d", &patch(&other)).0, 204);
    assert!(api.ask("GET", "/vm/config", "").1.contains(&format!("{other:?}")));
    std::fs::File::options().write(true).open(&other).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(api.ask("PATCH", "/drives/d", &patch(&other)).0, 204, "the same file again, after it has grown");
    assert!(api.refusal("PATCH", "/drives/d", r#"{"drive_id": "d"}"#).contains("name a path_on_host"));
    let limits = r#"{"drive_id": "d", "rate_limiter": {"ops": {"size": 7, "refill_time": 100}}}"#;
    assert_eq!(api.ask("PATCH", "/drives/d", limits).0, 204);
    let config: serde_json::Value = serde_json::from_str(&api.ask("GET", "/vm/config", "").1).unwrap();
    assert_eq!((&config["drives"][0]["rate_limiter"]["ops"]["size"], &config["balloon"]), (&7.into(), &().into()));
    // The test's own directory is visible, because the socket is in it; others are not.
    for unseen in ["/nowhere/x", "/dev/null"] {
        let said = api.refusal("PATCH", "/drives/d", &patch(Path::new(unseen)));
        assert!(said.contains(unseen) && said.contains("--visible"), "{said}");
    }
    assert!(api.refusal("PATCH", "/drives/d", &patch(&api.rig.fifo("fifo"))).contains("a FIFO"));
    assert!(api.refusal("PATCH", "/drives/e", r#"{"drive_id": "e"}"#).contains(r#"no drive "e""#));
    assert!(api.refusal("PATCH", "/drives/e", &patch(&disk)).contains("does not match"));
    assert!(api.refusal("PATCH", "/network-interfaces/n", r#"{"iface_id": "n"}"#).contains("no network interface"));
    assert!(api.ask("GET", "/vm/config", "").1.contains(&format!("{other:?}")), "a refusal changes nothing");
    api.stop();
}

#[test]
fn vcpus_come_and_none_goes() {
    let api = Api::new();
    api.put("/machine-config", r#"{"vcpu_count": 2, "max_vcpu_count": 6, "mem_size_mib": 64, "smt": true}"#);
    if !api.start() {
        return api.stop();
    }
    let vcpus = |count: u8| format!(r#"{{"count": {count}}}"#);
    assert_eq!(api.ask("GET", "/bedplate/vcpus", ""), (200, r#"{"count":2,"max_count":6}"#.into()));
    for (count, words) in [(8, "more than 6"), (1, "none is taken away"), (0, "none is"), (3, "with smt")] {
        let said = api.refusal("PUT", "/bedplate/vcpus", &vcpus(count));
        assert!(said.contains(words), "{count}: {said}");
    }
    for count in [4, 4, 6] {
        api.put("/bedplate/vcpus", &vcpus(count));
    }
    assert_eq!(api.ask("GET", "/bedplate/vcpus", ""), (200, r#"{"count":6,"max_count":6}"#.into()));
    assert!(api.ask("GET", "/machine-config", "").1.contains(r#""vcpu_count":6"#));
    assert!(api.ask("GET", "/bedplate/status", "").1.contains(r#""vcpus":{"count":6,"max_count":6}"#));
    api.stop();
}

#[test]
fn metadata_is_put_merged_and_limited() {
    let api = Api::new();
    assert_eq!(api.ask("GET", "/mmds", ""), (200, "{}".into()));
    assert_eq!(api.refusal("PATCH", "/mmds", "{}"), "MMDS error: The MMDS data store is not initialized.");
    api.put("/mmds", r#"{"a": {"b": 1, "c": [1, 2]}}"#);
    assert_eq!(api.ask("PATCH", "/mmds", r#"{"a": {"b": null, "d": "e"}}"#).0, 204);
    assert_eq!(api.ask("GET", "/mmds", ""), (200, r#"{"a":{"c":[1,2],"d":"e"}}"#.into()));
    let large = format!(r#"{{"x": "{}"}}"#, "y".repeat(51_000));
    api.put("/mmds", &large);
    let (status, said) = api.ask("PATCH", "/mmds", &large.replace('x', "z"));
    assert_eq!(status, 413);
    assert!(said.contains("MMDS limit exceeded error: The MMDS patch request doesn't fit."), "{said}");
    assert!(api.refusal("PUT", "/mmds/config", r#"{"network_interfaces": []}"#).contains("is empty"));
    assert!(
        api.refusal("PUT", "/mmds/config", r#"{"network_interfaces": ["n"]}"#).contains(r#"no network interface "n""#)
    );
    api.put("/network-interfaces/n", r#"{"iface_id": "n", "host_dev_name": "t", "mtu": 1400}"#);
    let config = r#"{"network_interfaces": ["n"], "version": "V2", "ipv4_address": "169.254.3.3"}"#;
    api.put("/mmds/config", config);
    assert!(api.refusal("PUT", "/mmds/config", &config.replace("254.3", "255.3")).contains("not link local"));
    let config: serde_json::Value = serde_json::from_str(&api.ask("GET", "/vm/config", "").1).unwrap();
    assert_eq!(config["mmds-config"]["version"], "V2");
    assert!(api.refusal("PUT", "/mmds/nowhere", "{}").contains("Invalid request method and/or path"));
    api.stop();
}

#[test]
fn one_device_is_the_root_in_firecracker_s_words() {
    let api = Api::new();
    let pmem = |id: &str, root: bool| format!(r#"{{"id": "{id}", "path_on_host": "p", "root_device": {root}}}"#);
    let disk = api.rig.path("disk");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let root = |id: &str| format!(r#"{{"drive_id": "{id}", "path_on_host": {disk:?}, "is_root_device": true}}"#);
    let drive = &root("d");
    api.put("/pmem/a", &pmem("a", false));
    api.put("/pmem/b", &pmem("b", true));
    // The same one again, with other words.
    api.put("/pmem/b", &pmem("b", true));
    assert_eq!(api.refusal("PUT", "/pmem/a", &pmem("a", true)), "Pmem config error: A root pmem device already exist");
    assert!(api.refusal("PUT", "/drives/d", drive).ends_with("while the root device defined as a pmem device"));
    api.put("/pmem/b", &pmem("b", false));
    api.put("/drives/d", drive);
    assert!(api.refusal("PUT", "/pmem/b", &pmem("b", true)).ends_with("root device defined as a block device"));
    let config: serde_json::Value = serde_json::from_str(&api.ask("GET", "/vm/config", "").1).unwrap();
    let first = r#"{"id": "a", "path_on_host": "p", "root_device": false, "read_only": false, "rate_limiter": null}"#;
    let first: serde_json::Value = serde_json::from_str(first).unwrap();
    assert_eq!((&config["pmem"][0], config["pmem"].as_array().unwrap().len()), (&first, 2));
    assert!(api.refusal("PUT", "/drives/e", &root("e")).contains("A root block device already exists"));
    let other = "The id from the path does not match the id from the body!";
    assert_eq!(api.refusal("PUT", "/pmem/c", &pmem("b", false)), other);
    assert_eq!(api.refusal("PATCH", "/pmem/c", r#"{"id": "b"}"#), other);
    assert_eq!(api.refusal("PUT", "/pmem", &pmem("b", false)), "The ID cannot be empty.");
    assert!(api.refusal("PUT", "/pmem/b", r#"{"id": "b"}"#).contains("path_on_host"));
    api.stop();
}

#[test]
fn what_cannot_be_is_refused_when_it_is_said() {
    let api = Api::new();
    let disk = api.rig.path("disk");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let missing = "cannot be opened: No such file or directory (os error 2)";
    let kernel = |more: &str| format!(r#"{{"kernel_image_path": {:?} {more}}}"#, api.rig.path("kernel"));
    let said = api.refusal("PUT", "/boot-source", r#"{"kernel_image_path": "/nowhere/k"}"#);
    assert!(said.starts_with(&format!("Boot source error: The kernel file {missing}")), "{said}");
    let said = api.refusal("PUT", "/boot-source", &kernel(r#", "initrd_path": "/nowhere/i""#));
    assert!(said.starts_with(&format!("Boot source error: The initrd file {missing}")), "{said}");
    assert!(api.refusal("PUT", "/drives/d", &drive(Path::new("/nowhere/d"))).contains(missing));
    assert!(api.ask("GET", "/vm/config", "").1.contains(r#""drives":[]"#));
    // Of a drive that is no root device nobody looks at the partition.
    api.put("/drives/d", &drive(&disk).replace("true}", r#"true, "partuuid": "any"}"#));

    let net = |id: &str, tap: &str, mac: &str| {
        let body = format!(r#"{{"iface_id": "{id}", "host_dev_name": "{tap}", "guest_mac": "{mac}"}}"#);
        (format!("/network-interfaces/{id}"), body)
    };
    let put = |(path, body): (String, String)| api.put(&path, &body);
    let refusal = |(path, body): (String, String)| api.refusal("PUT", &path, &body);
    put(net("a", "t0", "06:00:00:00:00:aa"));
    put(net("b", "t1", "06:00:00:00:00:bb"));
    let said = refusal(net("b", "t1", "06:00:00:00:00:AA"));
    assert_eq!(said, "Network config error: The MAC address is already in use: 06:00:00:00:00:AA");
    assert!(refusal(net("b", "t0", "06:00:00:00:00:bb")).contains(r#"host_dev_name "t0" exists twice"#));
    put(net("b", "t2", "06:00:00:00:00:bb"));

    api.put("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 256}"#);
    let balloon = |mib: u32| format!(r#"{{"amount_mib": {mib}, "deflate_on_oom": false}}"#);
    assert_eq!(api.refusal("PUT", "/balloon", &balloon(257)), "Amount of pages requested is too large.");
    api.put("/balloon", &balloon(200));
    let small = r#"{"mem_size_mib": 128}"#;
    assert!(api.refusal("PATCH", "/machine-config", small).contains("less than amount_mib of the balloon, 200"));
    api.put("/balloon", &balloon(0));
    assert_eq!(api.ask("PATCH", "/machine-config", small).0, 204);
    api.stop();
}

#[test]
fn what_a_logger_leaves_out_goes_on_and_a_vsock_may_be_named() {
    let api = Api::new();
    let (log, vsock) = (api.rig.path("messages"), api.rig.path("v"));
    api.put("/logger", &format!(r#"{{"log_path": {log:?}, "level": "Info"}}"#));
    api.put("/logger", r#"{"show_level": true}"#);
    api.put("/vsock/vsock0", &format!(r#"{{"vsock_id": "vsock0", "guest_cid": 3, "uds_path": {vsock:?}}}"#));
    let (status, config) = api.ask("GET", "/vm/config", "");
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!((status, &config["vsock"]["guest_cid"]), (200, &3.into()));
    assert_eq!(config["logger"], serde_json::json!({"log_path": log, "show_level": true}));
    api.stop();
}

#[test]
fn log_and_metrics_may_go_to_fifos_that_are_read_later() {
    let api = Api::new();
    let [log, metrics] = ["log.fifo", "metrics.fifo"].map(|name| api.rig.fifo(name));
    api.put("/logger", &format!(r#"{{"log_path": {log:?}, "show_level": true}}"#));
    api.put("/metrics", &format!(r#"{{"metrics_path": {metrics:?}}}"#));
    if !api.start() {
        return api.stop();
    }
    api.put("/actions", r#"{"action_type": "FlushMetrics"}"#);
    for (fifo, words) in [(log, "[one:main:INFO] the VM runs"), (metrics, r#"{"utc_timestamp_ms":"#)] {
        let mut text = [0; 1024];
        let len = std::fs::File::open(&fifo).unwrap().read(&mut text).unwrap();
        assert!(String::from_utf8_lossy(&text[..len]).contains(words), "{fifo:?}");
    }
    api.stop();
}

#[test]
fn the_processor_is_described_once_and_the_last_time_counts() {
    let api = Api::new();
    let described = || {
        let config: serde_json::Value = serde_json::from_str(&api.ask("GET", "/vm/config", "").1).unwrap();
        (config["machine-config"]["cpu_template"].clone(), config["cpu-config"].is_object())
    };
    let machine = |more: &str| api.put("/machine-config", &format!(r#"{{"vcpu_count": 1, "mem_size_mib": 64{more}}}"#));
    machine(r#", "cpu_template": "T2CL""#);
    assert_eq!(described(), ("T2CL".into(), false));
    machine("");
    assert_eq!(described(), ("T2CL".into(), false), "who does not name it leaves it");
    api.put("/cpu-config", r#"{"cpuid_modifiers": []}"#);
    assert_eq!(described(), (().into(), true));
    machine("");
    assert_eq!(described(), (().into(), true));
    assert_eq!(api.ask("PATCH", "/machine-config", r#"{"cpu_template": "C3"}"#).0, 204);
    assert_eq!(described(), ("C3".into(), false));
    let twice = api.ask("PATCH", "/machine-config", r#"{"cpu_baseline": "x86-64-v2"}"#);
    assert!(twice.0 == 400 && twice.1.contains("cpu_template C3 and cpu_baseline"), "{twice:?}");
    assert_eq!(api.ask("PATCH", "/machine-config", r#"{"cpu_template": "None", "cpu_baseline": "x86-64-v2"}"#).0, 204);
    assert!(
        api.refusal("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "V1N1"}"#)
            .contains("`T2A`")
    );
    api.stop();
}

#[test]
fn bodies_that_are_wrong_are_answered_in_words() {
    let api = Api::new();
    for (path, body, words) in [
        ("/drives/d", r#"[["d", "p", false]]"#, "an array where an object"),
        ("/snapshot/load", r#"{"snapshot_path": "s", "mem_backend": ["File", "m"]}"#, "mem_backend is an array"),
        ("/cpu-config", r#"{"cpuid_modifiers": [["0x1", "0x0", 0, []]]}"#, "cpuid_modifiers is an array"),
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64, "turbo": 1}"#, "unknown field `turbo`"),
        ("/machine-config", r#"{"vcpu_count": 1, "vcpu_count": 2, "mem_size_mib": 64}"#, "duplicate field"),
        ("/machine-config", r#"{"vcpu_count": 256, "mem_size_mib": 64}"#, "256"),
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": -1}"#, "-1"),
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "1G"}"#, "1G"),
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64, "cpu_baseline": "T2"}"#, "`x86-64-v3`"),
        ("/machine-config", r#"{"vcpu_count": 2, "max_vcpu_count": 1, "mem_size_mib": 64}"#, "max_vcpu_count 1"),
        ("/bedplate/vcpus", r#"{"count": 256}"#, "256"),
        ("/logger", r#"{"level": "Loud"}"#, "Loud"),
        ("/actions", "\u{0}", "deserializing the json body"),
        ("/vsock", "", "Empty PUT request."),
        ("/nowhere", "{}", "Invalid request method and/or path"),
    ] {
        let said = api.refusal("PUT", path, body);
        assert!(said.contains(words), "{path} {body}: {said}");
    }
    let deep = format!(r#"{{"boot_args": {}"#, "[".repeat(20_000));
    assert!(api.refusal("PUT", "/boot-source", &deep).contains("deserializing"));
    api.stop();
}

#[test]
fn a_gigabyte_is_refused_and_not_kept() {
    let api = Api::new();
    let socket = api.rig.path("api");
    let connect = || {
        let stream = eventually("the API's socket appears", || UnixStream::connect(&socket).ok());
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    };
    // Announced: refused before a byte of it came.
    let mut stream = connect();
    write!(stream, "PUT /actions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 1 << 30).unwrap();
    assert!(first_line(&mut stream).contains("413"));
    // Not announced: refused when it has become too much.
    let mut stream = connect();
    write!(stream, "PUT /actions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    let taken = (0..16384).take_while(|_| stream.write_all(chunk.as_bytes()).is_ok()).count();
    assert!(taken < 100, "{taken} chunks of 64 KiB were taken");
    assert_eq!(api.ask("GET", "/version", "").0, 200);
    api.stop();
}

#[test]
fn what_is_deprecated_is_answered_with_a_header() {
    let api = Api::new();
    let head = |path: &str, body: &str| {
        let mut stream = eventually("the API's socket appears", || UnixStream::connect(api.rig.path("api")).ok());
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let len = body.len();
        write!(stream, "PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.to_lowercase()
    };
    let machine = r#"{"vcpu_count": 1, "mem_size_mib": 64"#;
    let old = head("/machine-config", &format!(r#"{machine}, "cpu_template": "None"}}"#));
    assert!(old.starts_with("http/1.1 204") && old.contains("deprecation: true"), "{old}");
    assert!(head("/machine-config", &format!(r#"{machine}, "cpu_template": "T2"}}"#)).contains("deprecation: true"));
    assert!(!head("/machine-config", &format!("{machine}}}")).contains("deprecation"));
    api.stop();
}

#[test]
fn a_client_of_http_1_0_keeps_its_connection() {
    let api = Api::new();
    let mut stream = eventually("the API's socket appears", || UnixStream::connect(api.rig.path("api")).ok());
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = r#"{"a": 1}"#;
    for (request, status) in [
        ("GET /version HTTP/1.0\r\n\r\n".to_owned(), "200"),
        (format!("PUT /mmds HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()), "204"),
        ("GET /mmds HTTP/1.0\r\n\r\n".to_owned(), "200"),
    ] {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 4096];
        let len = stream.read(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer[..len]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && !answer.contains("date:"), "{request}: {answer}");
    }
    write!(stream, "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("firecracker_version"), "{rest}");
    api.stop();
}

fn first_line(stream: &mut UnixStream) -> String {
    let mut bytes = [0; 64];
    let len = stream.read(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..len]).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn half_requests_and_a_thousand_connections_keep_nobody_out() {
    let api = Api::new();
    let socket = api.rig.path("api");
    assert_eq!(api.ask("GET", "/version", "").0, 200);
    let mut held = Vec::new();
    for n in 0..1000 {
        // The host may have room for only so many that are not accepted yet.
        let mut stream = eventually("room for a connection", || UnixStream::connect(&socket).ok());
        let half: &[u8] = if n % 2 == 0 { b"PUT /drives/x HTTP/1.1\r\nHost: x\r\nContent-Le" } else { b"" };
        stream.write_all(half).unwrap();
        held.push(stream);
    }
    assert_eq!(api.ask("GET", "/version", "").0, 200);
    drop(held);
    assert_eq!(api.ask("GET", "/version", "").0, 200);
    api.stop();
}

#[test]
fn names_and_options_are_checked() {
    let said = |options: &[&str]| {
        let output = vmm().args(options).output().unwrap();
        assert_ne!(output.status.code(), Some(0), "{options:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let long = "x".repeat(65);
    for id in ["", "a_b", "a/b", long.as_str()] {
        assert!(said(&["--id", id]).contains("64 letters, digits and hyphens"), "{id}");
    }
    assert!(said(&["--snapshot-version"]).contains("snapshots are not offered"));
    assert!(said(&["--describe-snapshot", "x"]).contains("snapshots are not offered"));
    assert!(said(&["--seccomp-filter", "f"]).contains("seccomp filter f cannot be set"));
    assert!(said(&["--seccomp-filter", "f", "--no-seccomp"]).contains("cannot be used with"));
    assert!(said(&["--metadata", "/nowhere/data"]).contains("metadata file /nowhere/data: No such file"));
    assert!(said(&["--no-api"]).contains("--config-file"));
    assert!(said(&["--level", "Loud"]).contains("Off, Error, Warning"));
    assert!(said(&["--log-path", "/nowhere/log"]).contains("/nowhere/log"));
    let version = vmm().arg("--version").output().unwrap();
    assert!(version.status.success() && version.stdout.starts_with(b"bedplate-vmm "));
}

#[test]
fn the_command_line_sets_log_metrics_limits_and_times() {
    let rig = Rig::new(&[&SPIN]);
    let (log, metrics, api) = (rig.path("messages"), rig.path("metrics"), rig.path("api"));
    let mut command = rig.command();
    command.arg("--api-sock").arg(&api).arg("--log-path").arg(&log).arg("--metrics-path").arg(&metrics);
    command.args(["--level", "info", "--show-level", "--show-log-origin", "--http-api-max-payload-size", "40"]);
    command.args(["--start-time-us", "1", "--start-time-cpu-us", "0", "--parent-cpu-time-us", "5"]);
    let mut process = Running(command.args(["--no-seccomp", "--enable-pci", "--id", "cli-1"]).spawn().unwrap());
    let (status, body) =
        request(&api, "PUT", "/boot-source", &format!(r#"{{"kernel_image_path": "{}"}}"#, "x".repeat(40)));
    assert_eq!(status, 413, "{body}");
    let (_, status) = request(&api, "GET", "/bedplate/status", "");
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert!(status["process_startup_time_us"].as_u64() > Some(0), "{status}");
    assert!(status["process_startup_time_cpu_us"].as_u64() > Some(5), "{status}");
    assert!(metrics.exists());
    assert_eq!(request(&api, "PUT", "/bedplate/stop", "").0, 204);
    assert_eq!(process.wait(), 0);
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("[cli-1:main:INFO:") && log.contains("session.rs:") && log.contains("startup time"), "{log}");
}

#[test]
fn counters_are_written_at_the_end_wherever_they_were_asked_for() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SAY_X, &RESET, &SPIN]);
    let path = rig.path("metrics");
    let option = ["--metrics-path", path.to_str().unwrap()];
    let section = format!(r#", "metrics": {{"metrics_path": {path:?}, "emit_id": true}}"#);
    for (options, more, id) in [(&option[..], "", false), (&[], section.as_str(), true)] {
        assert!(rig.run_with(options, more).status.success());
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!((text.lines().count(), text.contains(r#""id":"anonymous-instance""#)), (1, id), "{text}");
        assert!(text.contains(r#""port_write":"#), "{text}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_core_dump_is_written_where_the_process_sees_it() {
    let api = Api::new();
    if !api.start() {
        return;
    }
    // The directory of its socket is visible.
    let path = api.rig.path("core");
    for _ in 0..2 {
        api.put("/bedplate/core-dump", &format!(r#"{{"path": {path:?}}}"#));
    }
    let dump = std::fs::read(&path).unwrap();
    assert!(dump.starts_with(b"\x7fELF") && dump.len() > 128 << 20, "{} bytes", dump.len());
    // The kernel is where it was loaded.
    let head = dump.len() - (128 << 20);
    assert_eq!(dump[head + (1 << 20)..][..SAY_X.len()], SAY_X);
    let said = api.refusal("PUT", "/bedplate/core-dump", r#"{"path": "/nowhere/core"}"#);
    assert!(said.contains("/nowhere/core") && said.contains("--visible"), "{said}");
    assert!(api.ask("GET", "/", "").1.contains("Running"));
    api.stop();
}

#[test]
fn a_virtio_console_listens_from_the_start_to_the_end() {
    let api = Api::new();
    let socket = api.rig.path("hvc");
    assert!(api.refusal("PUT", "/bedplate/console", "{}").contains("a socket or a file"));
    api.put("/bedplate/console", r#"{"socket": "/nowhere/hvc"}"#);
    api.put("/boot-source", &format!(r#"{{"kernel_image_path": {:?}}}"#, api.rig.path("kernel")));
    assert!(api.refusal("PUT", "/actions", START).contains("console: /nowhere/hvc"));
    api.put("/bedplate/console", &format!(r#"{{"socket": {socket:?}, "columns": 80, "rows": 25}}"#));
    if !api.start() {
        return;
    }
    let mut client = UnixStream::connect(&socket).unwrap();
    // Nobody reads in this guest; that holds nobody up.
    client.write_all(&[b'x'; 1000]).unwrap();
    let (status, _) = api.ask("PATCH", "/bedplate/console", r#"{"columns": 132, "rows": 43}"#);
    assert_eq!(status, 204);
    let status = api.ask("GET", "/bedplate/status", "").1;
    assert!(status.contains(r#""console":{"#) && status.contains(r#""output_bytes":0"#), "{status}");
    assert!(api.ask("GET", "/vm/config", "").1.contains(r#""columns":132"#));
    api.stop();
    assert!(!socket.exists());
}
