//! The API over real sockets, and what it says to everything that is wrong.

use bedplate_api::client::{Client, Endpoint, encode_frame};
use bedplate_api::error::ErrorKind;
use bedplate_api::image::{ImageKind, MAX_CHUNK_LIST};
use bedplate_api::vmm::RunState;
use bedplate_api::{ApiError, Digest, NodeId};
use bedplate_images::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::testing::{Bench, SmallNode, send, tier, until};

/// One request, as bytes; the whole answer, as text.
async fn raw(bench: &Bench, request: &str, body: &[u8]) -> String {
    let mut stream = UnixStream::connect(bench.dir.path().join("control.sock")).await.unwrap();
    ask(&mut stream, request, body).await
}

async fn ask(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), request: &str, body: &[u8]) -> String {
    let head = format!("{request}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    // A server that has seen enough may answer and close before it has taken everything.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

fn error(answer: &str) -> (u16, ApiError) {
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"));
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}")))
}

/// Who says that a body comes and sends none of it is told so, and does not hold a connection for ever.
#[tokio::test]
async fn a_body_that_stalls_is_given_up() {
    let bench = Bench::start().await;
    let stall = async |path: &str| {
        let mut stream = UnixStream::connect(bench.dir.path().join("control.sock")).await.unwrap();
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 64\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        error(&answer)
    };
    // Both at once: each takes as long as the limit is.
    for (status, error) in <[_; 2]>::from(tokio::join!(stall("/v1/tiers"), stall("/v1/chunks"))) {
        assert_eq!(status, 400);
        assert!(error.message.contains("timeout"), "{error}");
    }
}

#[tokio::test]
async fn every_wrong_request_gets_an_error_body_that_says_what_is_wrong() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    bench.push("vmm", ImageKind::Vmm).await;
    let big = vec![b' '; 3 << 20];
    let no_image = r#"{"name":"web","image":"nope","target":1}"#;
    let a_vmm = r#"{"name":"web","image":"vmm","target":1}"#;
    let bad_name = r#"{"name":"We b","image":"web","target":1}"#;
    let misspelt = r#"{"name":"web","image":"web","target":1,"memory":64}"#;
    let many = format!("{{\"digests\":[{}]}}", vec![format!("\"{}\"", Digest::ZERO); MAX_CHUNK_LIST + 1].join(","));
    let table: &[(&str, &[u8], u16, &str)] = &[
        ("GET /nothing HTTP/1.1", b"", 404, "nothing at /nothing"),
        ("DELETE /v1/nodes HTTP/1.1", b"", 405, "does not take DELETE"),
        ("POST /v1/tiers HTTP/1.1", b"{", 400, "EOF"),
        ("POST /v1/tiers HTTP/1.1", b"\xff\xfe", 400, "body"),
        ("POST /v1/tiers HTTP/1.1", misspelt.as_bytes(), 400, "unknown field `memory`"),
        ("POST /v1/tiers HTTP/1.1", &big, 413, "larger than"),
        ("POST /v1/tiers HTTP/1.1", bad_name.as_bytes(), 400, "lower-case letters"),
        ("POST /v1/tiers HTTP/1.1", no_image.as_bytes(), 400, "nope"),
        ("POST /v1/tiers HTTP/1.1", a_vmm.as_bytes(), 400, "kind \"vmm\""),
        ("PUT /v1/tiers/db HTTP/1.1", br#"{"name":"web","image":"web","target":1}"#, 400, "path names tier \"db\""),
        ("GET /v1/tiers/web HTTP/1.1", b"", 404, "no tier \"web\"; see `bedplate tier ls`"),
        ("DELETE /v1/tiers/web HTTP/1.1", b"", 404, "no tier \"web\""),
        ("GET /v1/vms/web-1/log HTTP/1.1", b"", 404, "see `bedplate vm ls`"),
        ("GET /v1/vms/web-1/console HTTP/1.1", b"", 400, "upgrade"),
        ("GET /v1/events?after=x HTTP/1.1", b"", 400, "after"),
        ("GET /v1/events?since=1 HTTP/1.1", b"", 400, "since"),
        ("GET /v1/tiers/%ff HTTP/1.1", b"", 400, "UTF-8"),
        ("GET /v1/images/none HTTP/1.1", b"", 404, "none"),
        ("GET /v1/images/..%2f..%2fetc HTTP/1.1", b"", 400, "not an image name"),
        ("PUT /v1/images/x HTTP/1.1", br#"{"digest":"blake3:1"}"#, 400, "not a digest"),
        ("GET /v1/blobs/blake3:00 HTTP/1.1", b"", 400, "not a digest"),
        ("POST /v1/chunks/missing HTTP/1.1", many.as_bytes(), 400, "too many"),
        ("POST /v1/chunks HTTP/1.1", &[0xff; 100], 413, "claims"),
        ("POST /v1/chunks HTTP/1.1", &[0; 20], 400, "ended inside a frame"),
    ];
    for (request, body, status, words) in table {
        let answer = raw(&bench, request, body).await;
        let (found, error) = error(&answer);
        assert_eq!(found, *status, "{request}: {answer}");
        assert!(error.message.contains(words), "{request}: {answer}");
    }
    let missing = format!("PUT /v1/images/x HTTP/1.1 {}", Digest::from_bytes([9; 32]));
    let missing = missing.split_once(" blake3").unwrap().0.to_owned();
    let body = format!("{{\"digest\":\"{}\"}}", Digest::from_bytes([9; 32]));
    assert_eq!(error(&raw(&bench, &missing, body.as_bytes()).await).0, 404);
    // Nothing of all this has left anything behind.
    assert!(bench.people.tiers().await.unwrap().is_empty());
    bench.serving.stop().await;
}

#[tokio::test]
async fn images_pass_through_whole_and_damage_is_refused() {
    let bench = Bench::start().await;
    let digest = bench.push("web", ImageKind::Disk).await;
    let images = bench.people.images().await.unwrap();
    assert_eq!((images.len(), images[0].name.as_str(), images[0].direct_boot), (1, "web", true));

    // A node fetches it by its digest, chunk by chunk, and has the same image.
    let copy = Store::create(bench.dir.path().join("copy")).unwrap();
    let manifest = bench.nodes.blob(&digest).await.unwrap();
    copy.put_blob_as(&digest, &manifest).unwrap();
    for part in copy.manifest(&digest).unwrap().parts.values() {
        copy.put_blob_as(&part.index, &bench.nodes.blob(&part.index).await.unwrap()).unwrap();
        let index = copy.index(part).unwrap();
        let digests: Vec<Digest> = (0..index.count()).map(|n| index.digest(n).unwrap()).collect();
        let missing = copy.missing(&digests);
        let keep =
            async |digest: Digest, frame: bytes::Bytes| copy.put_frame(&digest, &frame).map_err(|e| e.to_string());
        bench.nodes.fetch_chunks(missing, keep).await.unwrap();
    }
    copy.verify(&digest).unwrap();

    // What is not what it is called does not get in.
    let lie = bench.people.put_blob(&Digest::from_bytes([3; 32]), b"something else".to_vec()).await.unwrap_err();
    assert_eq!(lie.kind(), Some(ErrorKind::BadRequest));
    let frame = encode_frame(&Digest::from_bytes([3; 32]), b"noise");
    assert!(bench.people.put_chunks(vec![frame]).await.is_err());
    let absent = bench.nodes.fetch_chunks(vec![Digest::from_bytes([3; 32])], async |_, _| Ok(())).await.unwrap_err();
    assert!(Client::is_not_found(&absent), "{absent}");

    // A manifest whose chunks are not there is no image yet.
    let local = Store::create(bench.dir.path().join("half")).unwrap();
    let half = crate::testing::image(&local, "half", ImageKind::Disk);
    for part in local.manifest(&half).unwrap().parts.values() {
        bench.people.put_blob(&part.index, local.blob(&part.index).unwrap()).await.unwrap();
    }
    bench.people.put_blob(&half, local.blob(&half).unwrap()).await.unwrap();
    let error = bench.people.tag_image("half", half).await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::Conflict), "{error}");
    send(&bench.people, &local, &half).await;
    bench.people.tag_image("half", half).await.unwrap();
    bench.people.untag_image("half").await.unwrap();
    assert_eq!(bench.people.images().await.unwrap().len(), 1);
    bench.serving.stop().await;
}

#[tokio::test]
async fn nodes_need_the_token_and_get_no_further_than_their_half() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let endpoint = Endpoint::Http(bench.serving.node_address.unwrap().to_string());
    for token in [None, Some("wrong".to_owned()), Some(String::new())] {
        let stranger = Client::new(endpoint.clone(), token).unwrap();
        assert_eq!(stranger.images().await.unwrap_err().kind(), Some(ErrorKind::Unauthorized));
        assert_eq!(stranger.image("web").await.unwrap_err().kind(), Some(ErrorKind::Unauthorized));
    }
    assert_eq!(bench.nodes.images().await.unwrap().len(), 1);
    assert!(bench.nodes.tiers().await.is_err());
    assert!(bench.nodes.untag_image("web").await.is_err());
    assert!(bench.nodes.put_blob(&Digest::ZERO, Vec::new()).await.is_err());
    assert_eq!(bench.people.images().await.unwrap().len(), 1);

    let node = SmallNode::start("x").await;
    let unknown = bench.nodes.report(node.id, &node.status()).await.unwrap_err();
    assert!(Client::is_not_found(&unknown));
    let other = bench.nodes.report(NodeId::random(), &node.status()).await.unwrap_err();
    assert_eq!(other.kind(), Some(ErrorKind::BadRequest));
    bench.serving.stop().await;
}

/// It is sent as it is stored; who gets it asks about it, and is told.
#[tokio::test]
async fn a_chunk_that_rots_in_the_repository_is_named_to_who_gets_it() {
    let bench = Bench::start().await;
    let digest = bench.push("web", ImageKind::Disk).await;
    let images = Store::open(bench.dir.path().join("state/images")).unwrap();
    let chunks = images.distinct_chunks(&digest).unwrap();
    let (bad, hex) = (chunks[1], chunks[1].hex());
    let path = images.dir().join("chunks").join(&hex[..2]).join(&hex);
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(&path, damaged).unwrap();

    let copy = Store::create(bench.dir.path().join("copy")).unwrap();
    let fetch = async || {
        let keep =
            async |digest: Digest, frame: bytes::Bytes| copy.put_frame(&digest, &frame).map_err(|e| e.to_string());
        bench.nodes.fetch_chunks(copy.missing(&chunks), keep).await
    };
    let error = fetch().await.unwrap_err();
    let text = error.to_string();
    for part in [bad.to_string().as_str(), path.to_str().unwrap(), "is damaged", "again"] {
        assert!(text.contains(part), "{text:?} should name {part:?}");
    }
    assert!(Client::is_not_found(&error) && !path.exists(), "set aside");
    assert!(!copy.has_chunk(&bad));
    assert!(fetch().await.unwrap_err().to_string().contains(&format!("1 of {} chunks", chunks.len() - 1)));

    images.put_frame(&bad, &whole).unwrap();
    fetch().await.unwrap();
    assert_eq!(copy.missing(&chunks), []);
    bench.nodes.check_chunks(chunks.clone()).await.unwrap();
    let many = bench.nodes.check_chunks(vec![bad; MAX_CHUNK_LIST + 1]).await.unwrap_err();
    assert_eq!(many.kind(), Some(ErrorKind::BadRequest), "{many}");
    bench.serving.stop().await;
}

#[tokio::test]
async fn a_name_is_taken_once_and_a_replacement_is_atomic() {
    let bench = Bench::start().await;
    let first = bench.push("web", ImageKind::Disk).await;
    let mut spec = tier("web", "web", 1);
    assert_eq!(bench.people.create_tier(&spec).await.unwrap().digest, first);
    assert_eq!(bench.people.create_tier(&spec).await.unwrap_err().kind(), Some(ErrorKind::Conflict));
    spec.target = 10_001;
    assert!(bench.people.put_tier(&spec).await.is_err());
    assert_eq!(bench.people.tier("web").await.unwrap().spec.target, 1);
    assert!(bench.people.tier("web").await.unwrap().detail.unwrap().contains("no node is ready"));
    // A tag that moves moves no tier; asking for the tier again does.
    let store = Store::open(bench.dir.path().join("local")).unwrap();
    let second = crate::testing::image(&store, "other", ImageKind::Disk);
    send(&bench.people, &store, &second).await;
    bench.people.tag_image("web", second).await.unwrap();
    assert_eq!(bench.people.tier("web").await.unwrap().digest, first);
    assert_eq!(bench.people.put_tier(&tier("web", "web", 1)).await.unwrap().digest, second);
    bench.serving.stop().await;
}

#[tokio::test]
async fn garbage_is_what_no_name_and_no_tier_needs() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    bench.people.untag_image("web").await.unwrap();
    assert_eq!(bench.people.collect_garbage(0).await.unwrap().removed, 0, "the tier boots it");
    let store = Store::open(bench.dir.path().join("state/images")).unwrap();
    let digest = bench.people.tier("web").await.unwrap().digest;
    assert!(store.manifest(&digest).is_ok());
    bench.people.delete_tier("web").await.unwrap();
    assert_eq!(bench.people.collect_garbage(3600).await.unwrap().removed, 0, "it is young");
    let lease = store.lease().unwrap();
    let busy = bench.people.collect_garbage(0).await.unwrap_err();
    assert_eq!(busy.kind(), Some(ErrorKind::Unavailable), "{busy}");
    drop(lease);
    assert!(bench.people.collect_garbage(0).await.unwrap().removed >= 3, "manifest, index, a chunk");
    assert!(store.manifest(&digest).is_err());
    assert!(bench.nodes.collect_garbage(0).await.is_err(), "no business of a node");
    bench.serving.stop().await;
}

#[tokio::test]
async fn logs_and_consoles_come_from_the_node() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let node = SmallNode::start(&bench.serving.control.token).await;
    node.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    let vm = until("the VM", async || node.heard.lock().unwrap().desired.vms.first().cloned()).await;
    assert_eq!(bench.people.vm_log("web-1").await.unwrap(), format!("log of {}", vm.id));
    assert_eq!(bench.people.vm_log(&vm.id.to_string()).await.unwrap(), format!("log of {}", vm.id));

    assert_eq!(bench.people.vm_inspect("web-1").await.unwrap().state, RunState::Paused);

    let mut console = bench.people.vm_console("web-1").await.unwrap();
    let mut greeting = [0; 6];
    console.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello ");
    for word in [b"abc", b"def"] {
        console.write_all(word).await.unwrap();
        let mut echo = [0; 3];
        console.read_exact(&mut echo).await.unwrap();
        assert_eq!(echo.to_ascii_lowercase(), word);
    }
    drop(node);
    let away = until("the node to be away", async || bench.people.vm_log("web-1").await.err()).await;
    assert_eq!(away.kind(), Some(ErrorKind::Unavailable), "{away}");
    bench.serving.stop().await;
}

/// Plans, pools and pages look at every slot.
#[tokio::test]
async fn a_node_cannot_make_the_control_node_endless_by_a_number() {
    let bench = Bench::start().await;
    let node = SmallNode::start(&bench.serving.control.token).await;
    let mut liar = node.introduction(None);
    liar.status.capacity.slots = u32::MAX;
    let refused = bench.nodes.register(&liar).await.unwrap_err();
    assert!(refused.to_string().contains("4294967295 slots; one node has 1024 at most"), "{refused}");
    node.register(&bench.nodes, None).await;
    bench.nodes.report(node.id, &liar.status).await.unwrap();
    assert_eq!(bench.people.pool().await.unwrap().len(), 1024);
    bench.serving.stop().await;
}

#[tokio::test]
async fn the_page_is_for_looking_only_and_only_from_here() {
    let bench = Bench::start().await;
    let connect = async || TcpStream::connect(bench.serving.page_address.unwrap()).await.unwrap();
    let page = ask(&mut connect().await, "GET / HTTP/1.1", b"").await;
    assert!(
        page.starts_with("HTTP/1.1 200") && page.contains("No machine") && page.contains("content-security-policy")
    );
    assert!(ask(&mut connect().await, "GET /v1/nodes HTTP/1.1", b"").await.ends_with("[]"));
    for request in ["POST /v1/tiers HTTP/1.1", "DELETE /v1/tiers/web HTTP/1.1", "PUT /v1/images/x HTTP/1.1"] {
        let status = error(&ask(&mut connect().await, request, b"{}").await).0;
        assert!(matches!(status, 404 | 405), "{request}: {status}");
    }
    let mut stream = connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(error(&answer).0, 400);
    bench.serving.stop().await;
}
