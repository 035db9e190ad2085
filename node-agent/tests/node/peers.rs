//! Chunks from other nodes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bedplate_api::Digest;
use bedplate_api::client::encode_frame;
use rustix::thread::UnshareFlags;

use crate::copy::{Control, damage, disk, reported, repository};
use crate::support::{Node, SLEEP, eventually, image_with, kvm, spec};

/// Runs a test on a network that has nothing but a loopback interface, and is gone when the test's processes are.
fn alone(test: impl AsyncFnOnce() + Send + 'static) {
    // Without KVM nothing is copied for VMs that could not run.
    if !rustix::process::geteuid().is_root() || !kvm() {
        eprintln!("skipped: a network of their own for nodes takes root, and a copy KVM");
        return;
    }
    let body = move || {
        // SAFETY: only this thread's network changes.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    };
    std::thread::spawn(body).join().unwrap();
}

/// A node that gets images from `url` and is reached at 127.0.0.1:`port`.
async fn node(url: &str, port: u16) -> Node {
    let listen = format!("127.0.0.1:{port}");
    let args = ["--control", url, "--listen", &listen, "--token", "00ff", "--vm-network", "10.99.0.0/29"];
    let mut node = Node::reachable(&args);
    node.start().await;
    node
}

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

fn chunk_requests(control: &Control) -> usize {
    control.fetches.load(Ordering::SeqCst)
}

#[test]
fn a_node_gets_from_another_what_that_one_has() {
    alone(async || {
        let (_dir, control) = repository();
        let digest = image_with(&control.store, &[SLEEP], &disk(150));
        let url = control.serve().await;
        let first = node(&url, 7001).await;
        first.put(1, &[spec("one", digest)]).await;
        reported(&control, |s| s.images.contains(&digest)).await;
        let before = chunk_requests(&control);

        *control.peer.lock().unwrap() = Some(at(7001));
        let second = node(&url, 7002).await;
        second.put(1, &[spec("two", digest)]).await;
        second.until("it has the image", |s| s.images.contains(&digest)).await;
        // There are four batches. One or two that a stalled machine keeps too long are had from the repository.
        assert!(chunk_requests(&control) <= before + 2, "{} after {before}", chunk_requests(&control));
        second.store().verify(&digest).unwrap();
    });
}

#[test]
fn a_chunk_that_rotted_at_a_peer_is_set_aside_there_and_had_from_the_repository() {
    alone(async || {
        let (_dir, control) = repository();
        let digest = image_with(&control.store, &[SLEEP], &disk(100));
        let url = control.serve().await;
        let first = node(&url, 7001).await;
        first.put(1, &[spec("one", digest)]).await;
        reported(&control, |s| s.images.contains(&digest)).await;
        let manifest = control.store.manifest(&digest).unwrap();
        let chunk = control.store.index(&manifest.parts["disk"]).unwrap().digest(70).unwrap();
        let (path, _) = damage(&first.store(), &chunk);

        *control.peer.lock().unwrap() = Some(at(7001));
        let second = node(&url, 7002).await;
        second.put(1, &[spec("two", digest)]).await;
        second.until("it has the image", |s| s.images.contains(&digest)).await;
        second.store().verify(&digest).unwrap();
        assert!(!path.exists(), "the peer knows of it");
        assert!(first.log().contains(path.to_str().unwrap()), "and says so");
    });
}

#[test]
fn what_is_on_its_way_to_a_peer_is_waited_for() {
    alone(async || {
        let (_dir, control) = repository();
        let digest = image_with(&control.store, &[SLEEP], &disk(4));
        let url = control.serve().await;
        control.held.send_replace(true);
        let first = node(&url, 7001).await;
        first.put(1, &[spec("one", digest)]).await;
        eventually("the first node asks for its kernel", async || (chunk_requests(&control) == 1).then_some(())).await;

        // The second one asks the first for the very chunks, directly: it answers when it has them.
        let manifest = control.store.manifest(&digest).unwrap();
        let mut wanted = Vec::new();
        let kernel = control.store.index(&manifest.parts["kernel"]).unwrap();
        let note = |_, chunk| {
            wanted.push(chunk);
            Ok::<_, bedplate_images::StoreError>(())
        };
        kernel.each(note).unwrap();
        let absent = Digest::from_bytes([9; 32]);
        wanted.push(absent);
        let peer = bedplate_api::client::Client::new(
            bedplate_api::client::Endpoint::Http(at(7001).to_string()),
            Some("00ff".to_owned()),
        );
        let peer = peer.unwrap();
        let mut frames = peer.open_peer_chunks(wanted.clone(), 30).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(300), frames.next()).await;
        assert!(early.is_err(), "nothing has come yet: {early:?}");
        control.held.send_replace(false);
        let (got, _) = frames.next().await.unwrap().expect("it comes when it has landed");
        assert_eq!(got, wanted[0]);
        assert_eq!(frames.next().await.unwrap(), None, "what it does not have is left out");
        // Who does not wait is told at once what there is.
        let mut frames = peer.open_peer_chunks(vec![absent], 0).await.unwrap();
        assert_eq!(frames.next().await.unwrap(), None);
    });
}

/// Serves `answer` as a node at `port`; counts how often it was asked.
async fn liar(port: u16, answer: impl Fn() -> Response + Clone + Send + Sync + 'static) -> Arc<AtomicUsize> {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let route = post(async move || {
        count.fetch_add(1, Ordering::SeqCst);
        answer()
    });
    let listener = tokio::net::TcpListener::bind(at(port)).await.unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/v1/chunks/fetch", route)).await });
    asked
}

#[test]
fn a_peer_that_fails_or_lies_is_done_without() {
    alone(async || {
        let (_dir, control) = repository();
        let url = control.serve().await;
        let frame = control.store.frame(&control.store.put_chunk(b"another chunk").unwrap()).unwrap();
        let image = |n: u8| image_with(&control.store, &[SLEEP], &[disk(100), vec![n; 100]].concat());
        // Under the name of the first chunk that is wanted, which is the kernel's, comes another one.
        let digest = image(1);
        let kernel = &control.store.manifest(&digest).unwrap().parts["kernel"];
        let named = control.store.index(kernel).unwrap().digest(0).unwrap();
        let wrong = encode_frame(&named, &frame);
        let lies: [(u16, Box<dyn Fn() -> Response + Send + Sync>); 5] = [
            (7101, Box::new(move || wrong.clone().into_response())),
            (7102, Box::new(|| encode_frame(&Digest::from_bytes([7; 32]), b"never asked for").into_response())),
            (7103, Box::new(|| Bytes::from_static(&[0xff; 4000]).into_response())),
            (7104, Box::new(|| axum::http::StatusCode::INTERNAL_SERVER_ERROR.into_response())),
            // Accepts, and says nothing.
            (
                7105,
                Box::new(|| {
                    Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>()).into_response()
                }),
            ),
        ];
        for (port, lie) in lies {
            let lie = Arc::new(lie);
            let asked = liar(port, move || lie()).await;
            *control.peer.lock().unwrap() = Some(at(port));
            let node = node(&url, port + 100).await;
            node.put(1, &[spec("one", digest)]).await;
            node.until("it has the image all the same", |s| s.images.contains(&digest)).await;
            node.store().verify(&digest).unwrap();
            // A few requests were under way when the first one failed.
            assert!((1..=6).contains(&asked.load(Ordering::SeqCst)), "{port}: {asked:?}");
        }
        // Nobody is there at all.
        *control.peer.lock().unwrap() = Some(at(7999));
        let node = node(&url, 7300).await;
        node.put(1, &[spec("one", digest)]).await;
        node.until("it has the image all the same", |s| s.images.contains(&digest)).await;
    });
}
