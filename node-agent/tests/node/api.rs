//! The agent's API, over its Unix socket and over TCP.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bedplate_api::ApiError;
use bedplate_api::client::{Client, ClientError};
use bedplate_api::error::ErrorKind;
use bedplate_api::node::Desired;
use tokio::io::AsyncReadExt;

use crate::support::{Node, SAY_X, SLEEP, eventually, image, kvm, spec};

/// One request with whatever body: status and body of the answer.
fn raw(node: &Node, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(node.state().join("node.sock")).unwrap();
    stream.set_read_timeout(Some(crate::support::DEADLINE)).unwrap();
    let len = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n");
    // The server may answer and close before it has read all.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn every_refusal_says_what_is_wrong_and_changes_nothing() {
    let node = Node::running(&[]).await;
    let big = format!("{{\"generation\": 1, \"vms\": [], \"x\": \"{}\"}}", "y".repeat(2 << 20));
    let table = [
        ("PUT", "/v1/desired", "{", 400, "the body of PUT /v1/desired is not understood"),
        ("PUT", "/v1/desired", "{\"generation\": 1, \"vms\": [], \"vm\": 1}", 400, "unknown field `vm`"),
        ("PUT", "/v1/desired", "{\"generation\": -1, \"vms\": []}", 400, "invalid value"),
        ("PUT", "/v1/desired", &big, 413, "larger than 1048576 bytes"),
        ("DELETE", "/v1/desired", "", 405, "DELETE is not possible"),
        ("GET", "/v2/status", "", 404, "/v2/status"),
        ("GET", "/v1/vms/one/log", "", 400, "not the id of a VM"),
        ("GET", "/v1/vms/00000000-0000-0000-0000-000000000001/log", "", 404, "this node has no VM"),
        ("GET", "/v1/vms/00000000-0000-0000-0000-000000000001/console", "", 404, "this node has no VM"),
        ("POST", "/v1/chunks/fetch", "{\"digests\": [\"x\"]}", 400, "is not a digest"),
    ];
    for (method, path, body, status, word) in table {
        let (got, answer) = raw(&node, method, path, body);
        assert_eq!(got, status, "{method} {path}: {answer}");
        let error: ApiError = serde_json::from_str(&answer).unwrap();
        assert!(error.message.contains(word), "{method} {path}: {error}");
    }
    assert_eq!(node.client().node_status().await.unwrap().generation, 0);
}

#[tokio::test]
async fn an_older_generation_is_refused_and_the_same_is_no_change() {
    let node = Node::running(&[]).await;
    let mut off = spec("one", bedplate_api::Digest::ZERO);
    off.power = bedplate_api::node::Power::Stopped;
    node.put(5, std::slice::from_ref(&off)).await;
    assert_eq!(node.put(5, std::slice::from_ref(&off)).await.generation, 5);
    for (generation, vms) in [(4, vec![off.clone()]), (5, vec![])] {
        let refused = node.client().put_desired(&Desired { generation, vms }).await.unwrap_err();
        assert_eq!(refused.kind(), Some(ErrorKind::Conflict), "{refused}");
    }
    let twins = vec![off.clone(), off];
    let refused = node.client().put_desired(&Desired { generation: 6, vms: twins }).await.unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::BadRequest), "{refused}");
    assert_eq!(node.client().node_status().await.unwrap().generation, 5);
}

#[tokio::test]
async fn over_tcp_every_request_needs_the_token() {
    let node = Node::running(&["--listen", "127.0.0.1:0", "--token", "00c0ffee"]).await;
    // It answers on its socket before that.
    let port = eventually("the agent says where it serves", async || {
        let log = node.log();
        let port = |line: &str| Some(line.strip_suffix('\n')?.split_once("serves on 127.0.0.1:")?.1.to_owned());
        log.split_inclusive('\n').find_map(port)
    });
    let port = port.await;
    let endpoint: bedplate_api::client::Endpoint = format!("http://127.0.0.1:{port}").parse().unwrap();
    let client = |token: Option<&str>| Client::new(endpoint.clone(), token.map(str::to_owned)).unwrap();
    assert!(client(Some("00c0ffee")).node_status().await.is_ok());
    for wrong in [None, Some("00c0ffe"), Some("00c0ffeee"), Some("x")] {
        let refused = client(wrong).node_status().await.unwrap_err();
        assert!(matches!(&refused, ClientError::Api(e) if e.kind == ErrorKind::Unauthorized), "{refused}");
    }
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&node.state().join("node.sock").metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_listener_without_a_token_is_refused() {
    let node = Node::new(&["--listen", "127.0.0.1:0"]);
    let output = node.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--token"));
}

#[tokio::test]
async fn what_is_in_the_sockets_place_stays_there() {
    let first = Node::running(&[]).await;
    let precious = first.state().join("precious");
    std::fs::write(&precious, "words").unwrap();
    let live = first.state().join("node.sock");
    for (path, why) in [(&precious, "precious"), (&live, "another process listens there")] {
        let second = Node::new(&["--socket", path.to_str().unwrap()]);
        let output = second.command().output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(why), "{said}");
    }
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "words");
    assert!(first.client().node_status().await.is_ok(), "the first one goes on");
}

#[tokio::test]
async fn arguments_that_nobody_could_work_with_are_refused() {
    for args in [["--slots", "0"], ["--slots", "4294967295"], ["--mac", "zz"], ["--control", "http://127.0.0.1:1"]] {
        let node = Node::new(&args);
        let output = node.command().output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(args[0]), "{args:?}: {said}");
        assert!(!node.state().join("node.json").exists(), "{args:?} was noticed late");
    }
}

#[tokio::test]
async fn a_peer_gets_the_chunks_that_are_here() {
    let node = Node::running(&[]).await;
    let store = node.store();
    let digest = store.put_chunk(b"some bytes of a disk").unwrap();
    let mut frames = node.client().open_chunks(vec![digest]).await.unwrap();
    let (sent, frame) = frames.next().await.unwrap().unwrap();
    assert_eq!((sent, frame.to_vec()), (digest, store.frame(&digest).unwrap()));
    assert!(frames.next().await.unwrap().is_none());
    // What is not here is left out, and what does not parse is refused.
    let absent = bedplate_api::Digest::from_bytes([9; 32]);
    let mut frames = node.client().open_peer_chunks(vec![absent, digest], 0).await.unwrap();
    assert_eq!(frames.next().await.unwrap().unwrap().0, digest);
    assert!(frames.next().await.unwrap().is_none());
    let many = node.client().open_chunks(vec![absent; bedplate_api::image::MAX_CHUNK_LIST + 1]).await.err().unwrap();
    assert_eq!(many.kind(), Some(ErrorKind::BadRequest), "{many}");
}

#[tokio::test]
async fn a_console_begins_with_what_was_said_before() {
    if !kvm() {
        return;
    }
    let node = Node::running(&[]).await;
    let vm = spec("one", image(&node.store(), &[SAY_X, SLEEP]));
    node.put(1, std::slice::from_ref(&vm)).await;
    node.until_phase(vm.id, bedplate_api::node::VmPhase::Running).await;
    let mut console = node.client().node_vm_console(vm.id).await.unwrap();
    assert_eq!(console.read_u8().await.unwrap(), b'x');
}
