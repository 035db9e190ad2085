use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};

use super::*;

/// Long enough for a machine that does ten other things.
const DEADLINE: Duration = Duration::from_secs(60);

fn client(socket: &Path, wait_seconds: u32) -> ChunkClient {
    ChunkClient::open(&ChunkSource { socket: socket.to_string_lossy().into_owned(), wait_seconds }).unwrap()
}

/// Waits until the client has something to do, as a worker does, and lets it; true if requests may be tried again.
fn step(client: &mut ChunkClient) -> bool {
    let timeout = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(client.progress(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "nothing to do for a minute");
    client.proceed()
}

fn notes<const N: usize>(stream: &mut UnixStream) -> [Note; N] {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    std::array::from_fn(|_| {
        let mut bytes = [0; Note::LEN];
        stream.read_exact(&mut bytes).unwrap();
        Note::parse(bytes).unwrap()
    })
}

#[test]
fn what_is_wanted_is_asked_for_once_and_again_after_the_other_end_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chunks.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = client(&path, 3600);
    client.was_read(3);
    client.was_read(3);
    for number in [8, 9, 8] {
        assert!(matches!(client.want(number), Verdict::Wait));
    }
    let (mut first, _) = listener.accept().unwrap();
    assert_eq!(notes(&mut first), [Note::Read(3), Note::Wants(8), Note::Wants(9)]);
    // In two pieces, and with what nobody asked for before it.
    let answer = [Arrival::Here(77).encode(), Arrival::Here(9).encode()].concat();
    first.write_all(&answer[..12]).unwrap();
    assert!(!step(&mut client), "not for anybody");
    first.write_all(&answer[12..]).unwrap();
    while !step(&mut client) {}
    assert!(matches!(client.want(9), Verdict::Answered), "it is here, so that who lacks it still has another trouble");

    // Gone, with its name; then it is back.
    drop((first, listener));
    std::fs::remove_file(&path).unwrap();
    assert!(!step(&mut client), "nothing has arrived");
    assert!(matches!(client.want(8), Verdict::Wait));
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut second = loop {
        step(&mut client);
        if let Ok((stream, _)) = listener.accept() {
            break stream;
        }
    };
    second.set_nonblocking(false).unwrap();
    assert_eq!(notes(&mut second), [Note::Wants(8)]);
    second.write_all(&Arrival::Refused(8).encode()).unwrap();
    while !step(&mut client) {}
    assert!(matches!(client.want(8), Verdict::Answered));
}

#[test]
fn what_does_not_come_is_given_up_and_can_be_wanted_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chunks.sock");
    let mut client = client(&path, 1);
    assert!(matches!(client.want(5), Verdict::Wait));
    while !step(&mut client) {}
    assert!(matches!(client.want(5), Verdict::TooLate));
    // Who comes when everybody has heard of it waits anew.
    while matches!(client.want(5), Verdict::TooLate) {
        step(&mut client);
    }
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    while listener.accept().is_err() {
        step(&mut client);
    }
}

#[test]
fn wants_are_bounded_and_the_rest_gets_its_turn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chunks.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = client(&path, 3600);
    for number in 0..1000 {
        assert!(matches!(client.want(number), Verdict::Wait));
    }
    let (mut stream, _) = listener.accept().unwrap();
    let asked: [Note; MAX_WANTED] = notes(&mut stream);
    assert_eq!(asked[MAX_WANTED - 1], Note::Wants(MAX_WANTED as u64 - 1));
    stream.write_all(&Arrival::Here(0).encode()).unwrap();
    while !step(&mut client) {}
    assert!(matches!(client.want(999), Verdict::Wait));
    assert_eq!(notes(&mut stream), [Note::Wants(999)]);
}
