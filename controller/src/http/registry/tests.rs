//! What an OCI client asks, request by request, and what a hostile one does.

use bedplate_api::Digest;
use bedplate_api::image::ImageKind;
use bedplate_images::pack::oci::{self, Artifact, Descriptor, sha256};
use bedplate_images::pack::{MAX_CHUNKS, encode};
use bedplate_images::{CHUNK_SIZE, Store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::parse_range;
use crate::testing::{Bench, image};

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        let line = self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        line.unwrap_or_else(|| panic!("no {name} in {}", self.head))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One request; `more` are header lines.
async fn ask(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, request: &str, more: &str, body: &[u8]) -> Answer {
    let len = body.len();
    let head = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}content-length: {len}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let _ = stream.write_all(body).await;
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    // A connection that is broken off at once may have sent nothing at all.
    let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Answer { status: 0, head: String::new(), body: Vec::new() };
    };
    let head = String::from_utf8_lossy(&bytes[..at]).into_owned();
    let status = head.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap();
    let mut body = bytes.split_off(at + 4);
    if head.contains("transfer-encoding: chunked") {
        body = unchunk(&body);
    }
    Answer { status, head, body }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(at) = bytes.windows(2).position(|window| window == b"\r\n") {
        let len = usize::from_str_radix(std::str::from_utf8(&bytes[..at]).unwrap(), 16).unwrap();
        whole.extend_from_slice(&bytes[at + 2..at + 2 + len]);
        bytes = &bytes[at + 4 + len..];
    }
    whole
}

async fn people(bench: &Bench, request: &str, more: &str, body: &[u8]) -> Answer {
    ask(UnixStream::connect(bench.dir.path().join("control.sock")).await.unwrap(), request, more, body).await
}

#[tokio::test]
async fn an_image_of_the_store_is_pulled_by_what_speaks_oci() {
    let bench = Bench::start().await;
    let image = bench.push("web", ImageKind::Disk).await;
    assert_eq!(people(&bench, "GET /v2/", "", b"").await.status, 200);
    assert_eq!(people(&bench, "GET /v2/_catalog", "", b"").await.text(), r#"{"repositories":["web"]}"#);
    assert_eq!(people(&bench, "GET /v2/web/tags/list", "", b"").await.text(), r#"{"name":"web","tags":["latest"]}"#);
    let manifest = people(&bench, "GET /v2/web/manifests/latest", "", b"").await;
    assert_eq!(manifest.header("content-type"), oci::OCI_MANIFEST);
    assert_eq!(manifest.header("docker-content-digest"), sha256(&manifest.body));
    let by_digest = format!("GET /v2/web/manifests/{}", sha256(&manifest.body));
    assert_eq!(people(&bench, &by_digest, "", b"").await.body, manifest.body);
    let artifact = Artifact::parse(&manifest.body).unwrap();
    for piece in std::iter::once(&artifact.manifest).chain(&artifact.indexes).chain(&artifact.packs) {
        let request = format!("/v2/web/blobs/{}", piece.digest);
        let head = people(&bench, &format!("HEAD {request}"), "", b"").await;
        assert_eq!((head.status, head.header("content-length")), (200, piece.size.to_string().as_str()));
        let whole = people(&bench, &format!("GET {request}"), "", b"").await;
        assert_eq!(sha256(&whole.body), piece.digest);
        let last = piece.size as usize;
        for (from, to) in [(0, 1), (0, last), (last / 3, last / 2), (last - 1, last)] {
            let range =
                people(&bench, &format!("GET {request}"), &format!("range: bytes={from}-{}\r\n", to - 1), b"").await;
            assert_eq!((range.status, &range.body[..]), (206, &whole.body[from..to]), "{from}..{to}");
        }
        let behind = people(&bench, &format!("GET {request}"), &format!("range: bytes={last}-\r\n"), b"").await;
        assert_eq!(behind.status, 416);
    }
    let config = people(&bench, &format!("GET /v2/web/blobs/{}", artifact.manifest.digest), "", b"").await;
    assert_eq!(bedplate_images::digest_of(&config.body), image);

    // A chunk that has rotted: the reader is not told that all is well.
    let chunks = bench.dir.path().join("state/images/chunks");
    let pack = format!("GET /v2/web/blobs/{}", artifact.packs[0].digest);
    let chunk = std::fs::read_dir(&chunks).unwrap().next().unwrap().unwrap().path();
    let chunk = std::fs::read_dir(chunk).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&chunk, b"rot").unwrap();
    assert!((people(&bench, &pack, "", b"").await.body.len() as u64) < artifact.packs[0].size);
    bench.serving.stop().await;
}

#[tokio::test]
async fn nodes_pull_with_their_token_and_cannot_push() {
    let bench = Bench::start().await;
    bench.push("web", ImageKind::Disk).await;
    let address = bench.serving.node_address.unwrap();
    let token = format!("authorization: Bearer {}\r\n", bench.serving.control.token);
    let node = async |request: &str, more: &str| {
        ask(TcpStream::connect(address).await.unwrap(), request, more, b"").await.status
    };
    assert_eq!(node("GET /v2/web/manifests/latest", "").await, 401);
    assert_eq!(node("GET /v2/", "authorization: Bearer x\r\n").await, 401);
    assert_eq!(node("GET /v2/web/manifests/latest", &token).await, 200);
    assert_eq!(node("PUT /v2/web/manifests/latest", &token).await, 405);
    assert_eq!(node("POST /v2/web/blobs/uploads/", &token).await, 404);
    bench.serving.stop().await;
}

/// Sends a blob as clients do: begin, a piece, the rest with the digest.
async fn upload(bench: &Bench, name: &str, bytes: &[u8], digest: &str) -> Answer {
    let begun = people(bench, &format!("POST /v2/{name}/blobs/uploads/"), "", b"").await;
    assert_eq!(begun.status, 202, "{}", begun.text());
    let (first, rest) = bytes.split_at(bytes.len() / 2);
    let place = begun.header("location").to_owned();
    let piece = people(bench, &format!("PATCH {place}"), "", first).await;
    assert_eq!(piece.status, 202, "{}", piece.text());
    assert_eq!(people(bench, &format!("PATCH {place}"), "content-range: 1-2\r\n", b"xx").await.status, 416);
    people(bench, &format!("PUT {place}?digest={digest}"), "", rest).await
}

/// The image `digest` of `store` as a sender makes it.
fn blobs(store: &Store, digest: &Digest) -> (Artifact, Vec<Vec<u8>>) {
    let mut blobs = Vec::new();
    let mut keep = |kind: &str, bytes: Vec<u8>| {
        let descriptor = Descriptor::of(kind, &bytes);
        blobs.push(bytes);
        descriptor
    };
    let packs = store.distinct_chunks(digest).unwrap();
    let packs = packs.chunks(MAX_CHUNKS).map(|group| {
        let frames: Vec<_> = group.iter().map(|digest| (*digest, store.frame(digest).unwrap())).collect();
        keep(oci::PACK, encode(&frames).unwrap())
    });
    let packs = packs.collect();
    let indexes = store.manifest(digest).unwrap().parts.into_values();
    let indexes = indexes.map(|part| keep(oci::INDEX, oci::pack_index(&store.blob(&part.index).unwrap()).unwrap()));
    let indexes = indexes.collect();
    let manifest = keep(oci::MANIFEST, store.blob(digest).unwrap());
    (Artifact { manifest, indexes, packs, signature: None }, blobs)
}

#[tokio::test]
async fn an_image_is_pushed_and_survives_a_restart() {
    let bench = Bench::start().await;
    let store = Store::create(bench.dir.path().join("mine")).unwrap();
    let digest = image(&store, "mine", ImageKind::Disk);
    let (artifact, blobs) = blobs(&store, &digest);
    let manifest = artifact.encode(&digest).unwrap();
    let put = async |name: &str, bytes: &[u8]| people(&bench, &format!("PUT /v2/{name}"), "", bytes).await;
    let early = put("mine/manifests/latest", &manifest).await;
    assert_eq!(early.status, 404, "its blobs are not there: {}", early.text());
    for bytes in &blobs {
        let wrong = upload(&bench, "mine", bytes, &sha256(b"other")).await;
        assert!(wrong.status == 400 && wrong.text().contains("DIGEST_INVALID"), "{}", wrong.text());
        let sent = upload(&bench, "mine", bytes, &sha256(bytes)).await;
        assert_eq!(sent.status, 201, "{}", sent.text());
    }
    let tagged = put("mine/manifests/2", &manifest).await;
    assert!(tagged.status == 400 && tagged.text().contains("mine-2:latest"), "{}", tagged.text());
    let foreign = put(
        "mine/manifests/latest",
        br#"{"schemaVersion":2,"config":{"mediaType":"x","digest":"d","size":1},"layers":[]}"#,
    )
    .await;
    assert!(foreign.status == 400 && foreign.text().contains("MANIFEST_INVALID"), "{}", foreign.text());
    let done = put("mine/manifests/latest", &manifest).await;
    assert_eq!(
        (done.status, done.header("docker-content-digest")),
        (201, sha256(&manifest).as_str()),
        "{}",
        done.text()
    );
    assert_eq!(bench.people.image("mine").await.unwrap().digest, digest);
    bench.serving.control.images.verify(&digest).unwrap();

    let bench = bench.restart().await;
    let pulled = people(&bench, "GET /v2/mine/manifests/latest", "", b"").await;
    assert_eq!(pulled.body, manifest, "the same bytes, so the same digest");
    for bytes in &blobs {
        assert_eq!(&people(&bench, &format!("GET /v2/mine/blobs/{}", sha256(bytes)), "", b"").await.body, bytes);
    }
    // Without its own files the registry makes them again.
    std::fs::remove_dir_all(bench.dir.path().join("state/oci")).unwrap();
    let again = people(&bench, "GET /v2/mine/manifests/latest", "", b"").await;
    assert_eq!(Artifact::parse(&again.body).unwrap().manifest, artifact.manifest);
    bench.serving.stop().await;
}

#[tokio::test]
async fn hostile_pushes_are_refused_and_leave_nothing() {
    let bench = Bench::start().await;
    let store = Store::create(bench.dir.path().join("mine")).unwrap();
    let plain = vec![7; CHUNK_SIZE];
    let chunk = store.put_chunk(&plain).unwrap();
    let frame = store.frame(&chunk).unwrap();
    let pack = encode(&[(chunk, frame.clone())]).unwrap();
    let mut lie = pack.clone();
    lie[30] ^= 1;
    let mut count = pack.clone();
    count[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let longer = [&pack[..], b"x"].concat();
    for bytes in [&lie, &count, &longer, &pack[..pack.len() - 1].to_vec(), &pack[..30].to_vec()] {
        let answer = upload(&bench, "x", bytes, &sha256(bytes)).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
    }
    for (request, status, words) in [
        ("POST /v2/..%2fx/blobs/uploads/", 400, "NAME_INVALID"),
        ("PATCH /v2/x/blobs/uploads/..%2f..%2fcontrol.redb", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PUT /v2/x/blobs/uploads/nothing?digest=sha256:0", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("GET /v2/x/blobs/sha256:..%2f..%2f..%2fcontrol.redb", 400, "DIGEST_INVALID"),
        ("GET /v2/x/manifests/latest", 404, "NAME_UNKNOWN"),
        ("GET /v2/%2e%2e/manifests/latest", 400, "NAME_INVALID"),
        ("GET /v2/x/tags/list", 404, "NAME_UNKNOWN"),
    ] {
        let answer = people(&bench, request, "", b"").await;
        assert!(
            answer.status == status && answer.text().contains(words),
            "{request}: {} {}",
            answer.status,
            answer.text()
        );
    }
    let left = std::fs::read_dir(bench.dir.path().join("state/oci/uploads")).unwrap().count();
    assert_eq!(left, 0, "refused uploads are gone");
    assert!(!bench.serving.control.images.has_chunk(&chunk));
    bench.serving.stop().await;
}

#[test]
fn ranges() {
    assert_eq!(parse_range("bytes=0-9", 100), Some(Ok((0, 10))));
    assert_eq!(parse_range("bytes=90-", 100), Some(Ok((90, 100))));
    assert_eq!(parse_range("bytes=90-1000", 100), Some(Ok((90, 100))));
    assert_eq!(parse_range("bytes=100-", 100), Some(Err(())));
    assert_eq!(parse_range("bytes=5-4", 100), Some(Err(())));
    for odd in ["bytes=-5", "bytes=x-", "items=0-9", "bytes=0-18446744073709551615"] {
        assert_eq!(parse_range(odd, 100), None, "{odd}");
    }
}
