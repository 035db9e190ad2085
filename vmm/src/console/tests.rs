use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bedplate_devices::platform::SerialPort;

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
    let serving = console.serve(line.try_clone().unwrap(), &event()).unwrap();
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
fn a_device_as_log_is_never_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    let mut log = FileLog::open(&path).unwrap();
    for _ in 0..3 {
        log.append(&[b'x'; 700_000]);
    }
    assert!(!dir.path().join("log.old").exists());
}

#[test]
fn another_output_leaves_the_log_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let [log, out] = ["log", "out"].map(|name| dir.path().join(name));
    let mut console = Console::open(&Target::Off, Some(&log)).unwrap();
    assert!(console.redirect(&Target::File("/nowhere/out".into())).is_err());
    console.redirect(&Target::File(out.clone())).unwrap();
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let (mut sink, drained) = (console.sink(), event());
    let port = SerialPort::new(event(), drained.try_clone().unwrap(), Box::new(sink.clone()));
    let serving = console.serve(SerialLine { port: Arc::new(Mutex::new(port)), drained }, &event()).unwrap();
    sink.write_all(b"both").unwrap();
    drop(serving);
    assert_eq!([log, out].map(|path| std::fs::read(path).unwrap()), [b"both", b"both"]);
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

fn clients() -> (tempfile::TempDir, Clients) {
    let dir = tempfile::tempdir().unwrap();
    let clients = Clients::listen(&dir.path().join("serial.sock")).unwrap();
    (dir, clients)
}

fn join(dir: &tempfile::TempDir) -> UnixStream {
    let stream = UnixStream::connect(dir.path().join("serial.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// How many of the descriptors would wake the console thread.
fn ready(clients: &Clients, wants_input: bool) -> usize {
    let mut fds = Vec::new();
    clients.poll_fds(wants_input, &mut fds);
    poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap()
}

#[test]
fn a_guest_that_reads_nothing_keeps_no_client_from_watching() {
    let (dir, clients) = clients();
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let sink = Sink::new().unwrap();
    let mut server = Server {
        sink: sink.clone(),
        output: Output::Socket(clients),
        log: None,
        stdin_open: false,
        keys: Keys::new(false),
        line: SerialLine {
            port: Arc::new(Mutex::new(SerialPort::new(event(), event(), Box::new(sink.clone())))),
            drained: event(),
        },
        pending: vec![b'x'; 2 * MAX_PENDING_INPUT].into(),
        quit: event(),
        leave: event(),
    };
    sink.clone().write_all(b"hello").unwrap();
    let mut watcher = join(&dir);
    // It has said something and left; that the guest does not want to hear it must not wake us for ever.
    join(&dir).write_all(b"bye").unwrap();
    for _ in 0..3 {
        server.carry_output();
        server.carry_input();
    }
    expect(&mut watcher, b"hello");
    let Output::Socket(clients) = &server.output else { panic!("the output has changed") };
    assert_eq!(ready(clients, false), 0, "the console thread would spin");
}

#[test]
fn what_was_sent_before_hanging_up_is_heard_later() {
    let (dir, mut clients) = clients();
    join(&dir).write_all(b"late").unwrap();
    clients.exchange(None);
    clients.broadcast(b"to nobody");
    let mut input = VecDeque::new();
    clients.exchange(Some(&mut input));
    assert_eq!(input, b"late");
    clients.exchange(Some(&mut input));
    assert_eq!(ready(&clients, true), 0, "it is forgotten");
}

#[test]
fn those_who_hung_up_on_a_quiet_guest_make_room() {
    let (dir, mut clients) = clients();
    let mut input = VecDeque::new();
    let many: Vec<_> = (0..16).map(|_| join(&dir)).collect();
    clients.exchange(Some(&mut input));
    for client in &many {
        client.shutdown(std::net::Shutdown::Write).unwrap();
    }
    clients.exchange(Some(&mut input));
    assert_eq!(ready(&clients, true), 0, "who only listens has nothing to say");
    drop(many);
    assert_eq!(ready(&clients, true), 16);
    clients.exchange(Some(&mut input));
    assert_eq!(ready(&clients, true), 0);
    let mut many: Vec<_> = (0..16).map(|_| join(&dir)).collect();
    clients.exchange(Some(&mut input));
    clients.broadcast(b"seen");
    many.iter_mut().for_each(|client| expect(client, b"seen"));
}

#[test]
fn when_all_places_are_taken_the_oldest_that_only_listens_loses_its_own() {
    let (dir, mut clients) = clients();
    let mut input = VecDeque::new();
    let mut many: Vec<_> = (0..16).map(|_| join(&dir)).collect();
    clients.exchange(Some(&mut input));
    let mut late = join(&dir);
    assert_eq!(ready(&clients, true), 0, "everybody may still speak");
    many[3].shutdown(std::net::Shutdown::Write).unwrap();
    many[7].shutdown(std::net::Shutdown::Write).unwrap();
    clients.exchange(Some(&mut input));
    clients.broadcast(b"news");
    expect(&mut late, b"news");
    assert_eq!(many.remove(3).read(&mut [0; 8]).unwrap(), 0);
    many.iter_mut().for_each(|client| expect(client, b"news"));
}

#[test]
fn an_output_that_stalls_does_not_keep_the_console_from_ending() {
    use std::os::fd::AsRawFd;
    let (mut reader, writer) = io::pipe().unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
    let console = Console::open(&Target::File(path), None).unwrap();
    drop(writer);
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let (mut sink, drained) = (console.sink(), event());
    let port = SerialPort::new(event(), drained.try_clone().unwrap(), Box::new(sink.clone()));
    let serving = console.serve(SerialLine { port: Arc::new(Mutex::new(port)), drained }, &event()).unwrap();
    // More than a pipe holds.
    sink.write_all(&[b'x'; 512 << 10]).unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    thread::spawn(move || {
        drop(serving);
        let _ = done.send(());
    });
    ended.recv_timeout(Duration::from_secs(20)).unwrap();
    // It is not lost as long as the process lives.
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 512 << 10);
}

#[test]
fn an_outlet_delivers_everything_before_it_ends() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut outlet = Outlet::new(File::from(std::os::fd::OwnedFd::from(writer)), Duration::from_secs(20));
    outlet.start().unwrap();
    let bytes: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    bytes.chunks(999).for_each(|piece| outlet.push(piece));
    let end = thread::spawn(move || drop(outlet));
    let mut seen = Vec::new();
    reader.read_to_end(&mut seen).unwrap();
    end.join().unwrap();
    assert!(seen == bytes);
}
