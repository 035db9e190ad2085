//! The commands about a cluster, against a control node played by this test: what is asked, what is shown.

// Helpers of tests are tests: a panic there is the failure report.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

const DIGEST: &str = "blake3:0101010101010101010101010101010101010101010101010101010101010101";

/// A control node that knows answers by method and path, and remembers what it was asked.
struct Control {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Control {
    fn new(answers: &[(&str, Value)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("c.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let answers: BTreeMap<String, Value> = answers.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        let (answers, log) = (Arc::new(answers), Arc::clone(&asked));
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (answers, log) = (Arc::clone(&answers), Arc::clone(&log));
                std::thread::spawn(move || serve(&stream.unwrap(), &answers, &log));
            }
        });
        Self { dir, asked }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate"));
        let socket = format!("unix:{}", self.dir.path().join("c.sock").display());
        command.args(args).env("BEDPLATE_CONTROL", socket).current_dir(self.dir.path());
        command
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.command(args).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn fails(&self, args: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command(args).output().unwrap();
        assert_eq!(status.code(), Some(1), "{args:?}");
        String::from_utf8(stderr).unwrap()
    }

    fn put(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().iter().filter(|(line, _)| line.starts_with("P")).cloned().collect()
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

fn serve(stream: &UnixStream, answers: &BTreeMap<String, Value>, log: &Mutex<Vec<(String, Value)>>) {
    let mut input = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let request = line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        let (mut len, mut header) = (0, String::new());
        while input.read_line(&mut header).unwrap() > 2 {
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                len = value.trim().parse().unwrap();
            }
            header.clear();
        }
        let mut body = vec![0; len];
        input.read_exact(&mut body).unwrap();
        log.lock().unwrap().push((request.clone(), serde_json::from_slice(&body).unwrap_or(Value::Null)));
        if request.ends_with("/console") {
            return play_console(stream, input);
        }
        let (status, body) = match answers.get(&request) {
            Some(answer) => ("200 OK", answer.clone()),
            None => ("404 Not Found", json!({ "kind": "not_found", "message": format!("no {request}") })),
        };
        let body = body.to_string();
        let head =
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        let mut output = stream;
        output.write_all((head + &body).as_bytes()).unwrap();
    }
}

/// Greets, then echoes in capitals.
fn play_console(mut stream: &UnixStream, mut input: BufReader<&UnixStream>) {
    let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: bedplate-console\r\n\r\nlogin: ";
    stream.write_all(head.as_bytes()).unwrap();
    let mut byte = [0];
    while input.read(&mut byte).unwrap_or(0) == 1 {
        if stream.write_all(&byte.map(|b| b.to_ascii_uppercase())).is_err() {
            return;
        }
    }
}

fn tier(name: &str, target: u32) -> Value {
    json!({
        "spec": { "name": name, "image": "web", "target": target, "cpus": 1, "memory_mib": 512, "disk": "non_persistent", "active": true },
        "digest": DIGEST, "assigned": 1, "running": 1,
    })
}

fn vm(name: &str, node: &str) -> Value {
    json!({
        "id": "00000000-0000-0000-0000-000000000001", "name": name, "tier": "web", "node": node, "slot": 0,
        "phase": "running", "address": "10.78.1.2", "restarts": 2,
    })
}

fn node(name: &str) -> Value {
    json!({
        "name": name, "state": "ready", "mac": "52:54:00:00:00:01", "address": "10.77.0.5", "slots_used": 1,
        "last_seen_seconds": 3, "capacity": { "cpus": 2, "memory_mib": 4096, "slots": 4, "disk_free": 1 << 30 },
    })
}

#[test]
fn lists_are_short_tables_or_the_apis_own_json() {
    let vms = json!([vm("web-1", "node-1"), vm("web-2", "node-2")]);
    let control = Control::new(&[("GET /v1/nodes", json!([node("node-1")])), ("GET /v1/vms", vms.clone())]);
    let table = control.ok(&["node", "ls"]);
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(table.lines().all(|line| line.len() <= 80), "{table}");
    for word in ["node-1", "ready", "10.77.0.5", "4.0 GiB", "1/4", "3s ago"] {
        assert!(table.contains(word), "{word} is not in {table}");
    }
    let json: Value = serde_json::from_str(&control.ok(&["vm", "ls", "-o", "json"])).unwrap();
    assert_eq!(json, vms);
    let shown = control.ok(&["node", "show", "node-1"]);
    assert!(shown.contains("web-1") && !shown.contains("web-2"), "{shown}");
    assert!(control.fails(&["node", "show", "node-9"]).contains("bedplate node ls"));
}

#[test]
fn a_tier_is_changed_in_what_was_asked_and_nothing_else() {
    let control = Control::new(&[("GET /v1/tiers/web", tier("web", 2)), ("PUT /v1/tiers/web", tier("web", 5))]);
    control.ok(&["tier", "scale", "web", "5"]);
    let mut wanted = tier("web", 5)["spec"].clone();
    assert_eq!(control.put(), [("PUT /v1/tiers/web".to_owned(), wanted.clone())]);
    control.ok(&["tier", "deactivate", "web"]);
    wanted["target"] = json!(2);
    wanted["active"] = json!(false);
    assert_eq!(control.put()[1].1, wanted);
    assert!(control.fails(&["tier", "scale", "db", "5"]).contains("bedplate tier ls"));
}

#[test]
fn a_tier_is_created_as_the_options_say() {
    let control = Control::new(&[("POST /v1/tiers", tier("web", 2))]);
    control.ok(&[
        "tier",
        "create",
        "web",
        "--image",
        "web",
        "--target",
        "2",
        "--memory",
        "1G",
        "--cpus",
        "2",
        "--persistent",
    ]);
    let wanted = json!({
        "name": "web", "image": "web", "target": 2, "cpus": 2, "memory_mib": 1024, "disk": "persistent", "active": false,
    });
    assert_eq!(control.put()[0].1, wanted);
}

#[test]
fn apply_sends_what_differs_and_a_dry_run_or_a_mistake_nothing() {
    let control = Control::new(&[
        ("GET /v1/tiers", json!([tier("web", 2), tier("db", 1)])),
        ("PUT /v1/tiers/web", tier("web", 3)),
    ]);
    let base = "image: web, active: true, target";
    let file = control.file("t.yaml", &format!("- {{name: web, {base}: 3}}\n- {{name: db, {base}: 1}}\n"));
    let file = file.to_str().unwrap();
    let plan = control.ok(&["apply", "-f", file, "--dry-run"]);
    assert!(plan.contains("target 2 → 3") && plan.contains("keep"), "{plan}");
    assert_eq!(control.put(), []);
    assert_eq!(control.ok(&["apply", "-f", file]), plan);
    assert_eq!(control.put().len(), 1);
    let bad = control.file("bad.yaml", "- name: web\n  target: 1\n  image: web\n  cpu: 4\n");
    let said = control.fails(&["apply", "-f", bad.to_str().unwrap()]);
    assert!(said.contains("line 4") && said.contains("`cpu`") && said.contains("nothing was changed"), "{said}");
    assert_eq!(control.put().len(), 1);
    let said = control.fails(&["apply", "-f", "/nosuch"]);
    assert!(said.contains("cannot read /nosuch") && said.contains("name a file of tiers"), "{said}");
}

#[test]
fn a_console_passes_keys_on_until_it_is_left() {
    let control = Control::new(&[]);
    let mut child = control
        .command(&["vm", "console", "web-1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"root\r").unwrap();
    let mut said = vec![0; "login: ROOT\r".len()];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(said, b"login: ROOT\r");
    stdin.write_all(b"\x01x").unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}
