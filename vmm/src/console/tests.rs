use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;

struct Rig {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    line: SerialLine,
    sink: Sink,
    serving: Option<Serving>,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("serial.sock");
    let console = Console::open(&Target::Socket(socket.clone()), Some(&dir.path().join("log"))).unwrap();
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let (sink, drained) = (console.sink(), event());
    let port = SerialPort::new(event(), drained.try_clone().unwrap(), Box::new(sink.clone()));
    let line = SerialLine { port: Arc::new(Mutex::new(port)), drained };
    let serving = console.serve(&line, &event()).unwrap();
    Rig { _dir: dir, socket, line, sink, serving: Some(serving) }
}

fn connect(rig: &Rig) -> UnixStream {
    let stream = UnixStream::connect(&rig.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn expect(stream: &mut UnixStream, text: &[u8]) {
    let mut bytes = vec![0; text.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, text);
}

#[test]
fn a_late_client_sees_the_past_and_two_clients_see_the_same() {
    let mut rig = rig();
    rig.sink.write_all(b"early ").unwrap();
    let (mut one, mut two) = (connect(&rig), connect(&rig));
    expect(&mut one, b"early ");
    expect(&mut two, b"early ");
    rig.sink.write_all(b"late").unwrap();
    expect(&mut one, b"late");
    expect(&mut two, b"late");
    drop(rig.serving.take());
    assert!(!rig.socket.exists());
    assert_eq!(std::fs::read(rig.socket.with_file_name("log")).unwrap(), b"early late");
}

#[test]
fn input_beyond_the_fifo_arrives_in_order() {
    use bedplate_devices::bus::BusDevice;
    let rig = rig();
    let sent: Vec<u8> = (0..2000u32).map(|n| n as u8).collect();
    connect(&rig).write_all(&sent).unwrap();
    let mut seen = Vec::new();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while seen.len() < sent.len() {
        assert!(std::time::Instant::now() < deadline, "{} of {} bytes", seen.len(), sent.len());
        let mut port = rig.line.port.lock().unwrap();
        let mut status = [0];
        port.read(5, &mut status);
        if status[0] & 1 == 0 {
            drop(port);
            std::thread::yield_now();
            continue;
        }
        let mut byte = [0];
        port.read(0, &mut byte);
        seen.push(byte[0]);
    }
    assert_eq!(seen, sent);
}

#[test]
fn the_log_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut log = FileLog::open(&path).unwrap();
    for _ in 0..5 {
        log.append(&[b'x'; 700_000]);
    }
    let len = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().len();
    assert_eq!((len("log"), len("log.old")), (700_000, 700_000));
}

#[test]
fn ctrl_a_x_leaves_and_everything_else_is_the_guests() {
    let mut guest = VecDeque::new();
    let mut keys = Keys::new(true);
    assert!(!keys.pass(b"a\x01", &mut guest));
    assert!(!keys.pass(b"\x01\x01b", &mut guest));
    assert!(keys.pass(b"\x01x", &mut guest));
    assert_eq!(guest, b"a\x01\x01b".iter().copied().collect::<VecDeque<_>>());
    assert!(!Keys::new(false).pass(b"\x01x", &mut guest));
}

#[test]
fn targets_are_parsed() {
    assert_eq!("socket:/a:b".parse(), Ok(Target::Socket("/a:b".into())));
    for bad in ["", "file:", "tty", "socket"] {
        assert!(bad.parse::<Target>().is_err(), "{bad}");
    }
}
