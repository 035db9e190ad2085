//! Packets: what machines of each kind are told, first without a socket, then over a cable (a veth pair between two network
//! namespaces that exist for this test only).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use bedplate_api::control::{NodeState, PoolKind};
use bedplate_api::image::ImageKind;
use dhcproto::v4::{Architecture, DhcpOption, Flags, HType, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};

use super::dhcp::{Client, Server, client, reply};
use super::tftp;
use crate::testing::{Bench, SmallNode, net, options, until};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

fn server() -> Server {
    let address = Ipv4Addr::new(10, 77, 0, 1);
    Server { address, http: SocketAddr::from((address, 7070)), network: net("10.77.0.0/24") }
}

/// A request of a machine of this kind.
fn request(mac: [u8; 6], kind: MessageType, who: Client, xid: u32) -> Message {
    let mut message = Message::default();
    message.set_opcode(Opcode::BootRequest).set_xid(xid).set_chaddr(&mac).set_flags(Flags::default().set_broadcast());
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    let pxe = |architecture| {
        [
            DhcpOption::ClassIdentifier(b"PXEClient:Arch:00000:UNDI:002001".to_vec()),
            DhcpOption::ClientSystemArchitecture(architecture),
        ]
    };
    match who {
        Client::Bios => pxe(Architecture::X86_Bios).map(|o| options.insert(o)).len(),
        Client::Uefi => pxe(Architecture::X64).map(|o| options.insert(o)).len(),
        Client::Ipxe => {
            // iPXE goes on saying that it is a PXE client, too.
            options.insert(DhcpOption::UserClass(b"iPXE".to_vec()));
            pxe(Architecture::X86_Bios).map(|o| options.insert(o)).len()
        }
        Client::Plain => 0,
    };
    message
}

fn option(message: &Message, code: OptionCode) -> Option<&DhcpOption> {
    message.opts().get(code)
}

fn file(message: &Message) -> Option<&str> {
    message.fname_str().map(|name| name.unwrap().trim_end_matches('\0'))
}

#[test]
fn each_kind_of_machine_is_told_what_it_can_boot() {
    let address = Ipv4Addr::new(10, 77, 0, 10);
    for (who, boots) in [
        (Client::Bios, Some("undionly.kpxe")),
        (Client::Uefi, Some("snponly.efi")),
        (Client::Ipxe, Some("http://10.77.0.1:7070/boot/ipxe?mac=52:54:00:00:00:01")),
        (Client::Plain, None),
    ] {
        let discover = request(MAC, MessageType::Discover, who, 7);
        let (mac, found) = client(&discover).unwrap();
        assert_eq!((mac.as_str(), found), ("52:54:00:00:00:01", who));
        let offer = reply(&discover, &server(), &mac, who, address).unwrap();
        assert!(offer.opts().has_msg_type(MessageType::Offer));
        assert_eq!((offer.yiaddr(), offer.siaddr(), offer.xid()), (address, server().address, 7));
        assert_eq!(file(&offer), boots, "{who:?}");
        let mask = option(&offer, OptionCode::SubnetMask);
        assert_eq!(mask, Some(&DhcpOption::SubnetMask([255, 255, 255, 0].into())));
    }
}

#[test]
fn a_request_is_acknowledged_refused_or_left_to_the_server_that_it_names() {
    let address = Ipv4Addr::new(10, 77, 0, 10);
    let answer = |wanted: Ipv4Addr, of: Option<Ipv4Addr>| {
        let mut message = request(MAC, MessageType::Request, Client::Plain, 7);
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(wanted));
        if let Some(of) = of {
            message.opts_mut().insert(DhcpOption::ServerIdentifier(of));
        }
        reply(&message, &server(), "", Client::Plain, address).and_then(|m| m.opts().msg_type())
    };
    assert_eq!(answer(address, Some(server().address)), Some(MessageType::Ack));
    assert_eq!(answer(address, None), Some(MessageType::Ack));
    assert_eq!(answer(Ipv4Addr::new(192, 168, 1, 9), None), Some(MessageType::Nak));
    assert_eq!(answer(address, Some(Ipv4Addr::new(10, 77, 0, 2))), None);
    // Renewal: the address stands in the head, not in an option.
    let mut renew = request(MAC, MessageType::Request, Client::Plain, 7);
    renew.set_ciaddr(address);
    assert!(reply(&renew, &server(), "", Client::Plain, address).unwrap().opts().has_msg_type(MessageType::Ack));
    for other in [MessageType::Release, MessageType::Decline, MessageType::Offer] {
        assert!(reply(&request(MAC, other, Client::Plain, 7), &server(), "", Client::Plain, address).is_none());
    }
}

#[test]
fn what_is_no_request_of_a_client_here_is_passed_over() {
    let good = || request(MAC, MessageType::Discover, Client::Ipxe, 7);
    assert!(client(&good()).is_some());
    assert!(client(good().set_opcode(Opcode::BootReply)).is_none());
    assert!(client(good().set_htype(HType::Unknown(32))).is_none());
    assert!(client(good().set_giaddr([10, 0, 0, 1])).is_none());
    assert!(client(good().set_chaddr(&[1; 8])).is_none());
    // A length beyond the field, as only a hostile packet has it.
    let mut bytes = encode(&good());
    bytes[2] = 255;
    assert!(client(&Message::decode(&mut Decoder::new(&bytes)).unwrap()).is_none());
    // Any cut of a packet is decoded or refused, and never worse.
    for cut in 0..bytes.len() {
        if let Ok(message) = Message::decode(&mut Decoder::new(&bytes[..cut])) {
            let _ = client(&message);
        }
    }
}

fn encode(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

/// A thread in a network namespace of its own, at the other end of the cable.
struct Machine(mpsc::Sender<Box<dyn FnOnce() + Send>>);

impl Machine {
    /// The namespace as a path, and the thread.
    fn new() -> (String, Self) {
        let (tasks, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (path, ready) = mpsc::channel();
        std::thread::spawn(move || {
            leave_network();
            let id = rustix::thread::gettid().as_raw_nonzero();
            path.send(format!("/proc/{}/task/{id}/ns/net", std::process::id())).unwrap();
            inbox.into_iter().for_each(|task| task());
        });
        (ready.recv().unwrap(), Self(tasks))
    }

    async fn run<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, answer) = tokio::sync::oneshot::channel();
        self.0.send(Box::new(move || drop(done.send(act())))).unwrap();
        answer.await.expect("the machine's thread panicked, see above")
    }
}

fn leave_network() {
    // SAFETY: only the network namespace of this thread changes; no file descriptor table or memory is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
}

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Sends `messages`, and returns the first answer to arrive.
fn exchange(messages: &[Message]) -> Message {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.bind_device(Some(b"m0")).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], 68)).into()).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for message in messages {
        socket.send_to(&encode(message), "255.255.255.255:67").unwrap();
    }
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).unwrap();
    Message::decode(&mut Decoder::new(&buffer[..length])).unwrap()
}

/// Discover, request: the address, and the file to boot.
fn take_address(mac: [u8; 6], who: Client) -> (Ipv4Addr, Option<String>) {
    let offer = exchange(&[request(mac, MessageType::Discover, who, 1)]);
    assert!(offer.opts().has_msg_type(MessageType::Offer));
    let mut message = request(mac, MessageType::Request, who, 2);
    message.opts_mut().insert(DhcpOption::RequestedIpAddress(offer.yiaddr()));
    message.opts_mut().insert(DhcpOption::ServerIdentifier(offer.siaddr()));
    let ack = exchange(&[message]);
    assert!(ack.opts().has_msg_type(MessageType::Ack));
    assert_eq!(ack.yiaddr(), offer.yiaddr());
    (ack.yiaddr(), file(&ack).map(str::to_owned))
}

/// Reads a whole file as firmware does; an error packet is an `Err`.
fn fetch_by_tftp(code: u8, name: &str, options: &str) -> Result<Vec<u8>, String> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let ask = [&[0, code], name.as_bytes(), b"\0octet\0", options.as_bytes()].concat();
    socket.send_to(&ask, "10.77.0.1:69").unwrap();
    let (mut file, mut next, mut block) = (Vec::new(), 1u16, 512);
    loop {
        let mut packet = [0; 2048];
        let (length, peer) = socket.recv_from(&mut packet).unwrap();
        let (head, body) = packet[..length].split_at(4);
        let number = u16::from_be_bytes([head[2], head[3]]);
        match head[1] {
            6 => {
                let text = String::from_utf8_lossy(&packet[2..length]).replace('\0', " ");
                block = text.split_once("blksize ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
                socket.send_to(&[0, 4, 0, 0], peer).unwrap();
            }
            3 if number == next => {
                file.extend_from_slice(body);
                socket.send_to(&[&[0, 4][..], &number.to_be_bytes()].concat(), peer).unwrap();
                next = next.wrapping_add(1);
                if body.len() < block {
                    return Ok(file);
                }
            }
            5 => return Err(String::from_utf8_lossy(body).into_owned()),
            _ => {}
        }
    }
}

fn fetch_by_http(url: &str) -> (String, Vec<u8>) {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end + 4..].to_vec())
}

#[test]
fn a_blank_machine_on_a_cable_becomes_a_node() {
    if !rustix::process::geteuid().is_root() || !std::path::Path::new(super::IPXE).join(tftp::BIOS).exists() {
        println!("skipped: netboot over a cable needs root, and the package ipxe");
        return;
    }
    let test = std::thread::spawn(|| {
        leave_network();
        let (there, machine) = Machine::new();
        ip("link set lo up");
        ip("link add bp type veth peer name m0");
        ip("address add 10.77.0.1/24 dev bp");
        ip("link set bp up");
        ip(&format!("link set m0 netns {there}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(boot_a_machine(machine));
    });
    test.join().unwrap();
}

async fn boot_a_machine(machine: Machine) {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(&dir);
    options.netboot = Some("bp".into());
    options.node_listen = Some("10.77.0.1:0".parse().unwrap());
    let bench = Bench::start_in(dir, options).await;
    machine.run(|| ip("link set m0 up")).await;
    firmware(&machine).await;
    let (mine, url) = machine.run(|| take_address(MAC, Client::Ipxe)).await;
    let url = url.unwrap();
    machine.run(move || ip(&format!("address add {mine}/24 dev m0"))).await;
    over_tftp(&machine).await;
    scripts_and_files(&bench, &machine, url).await;
    machine.run(ask_for_a_router).await;
    registers(&bench, mine).await;
    bench.serving.stop().await;
    assert!(!ip("route show").contains("10.78."), "routes go with the control node");
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/conf/bp/forwarding").unwrap().trim(), "0");
}

async fn firmware(machine: &Machine) {
    // The first is none of ours and gets nothing: the first answer is the one to the second.
    let mut stranger = MAC;
    stranger[5] = 99;
    let plain = request(stranger, MessageType::Discover, Client::Plain, 11);
    let bios = request(MAC, MessageType::Discover, Client::Bios, 12);
    let offer = machine.run(move || exchange(&[plain, bios])).await;
    assert_eq!(offer.xid(), 12);
    let (first, boots) = machine.run(|| take_address(MAC, Client::Bios)).await;
    assert_eq!((first, boots.as_deref()), (Ipv4Addr::new(10, 77, 0, 10), Some("undionly.kpxe")));
    let mut second = MAC;
    second[5] = 2;
    let (other, boots) = machine.run(move || take_address(second, Client::Uefi)).await;
    assert_eq!((other, boots.as_deref()), (Ipv4Addr::new(10, 77, 0, 11), Some("snponly.efi")));
    // Its own system, later: the same address, nothing to boot.
    assert_eq!(machine.run(|| take_address(MAC, Client::Plain)).await, (first, None));
    let mut wrong = request(MAC, MessageType::Request, Client::Plain, 13);
    wrong.opts_mut().insert(DhcpOption::RequestedIpAddress(other));
    let nak = machine.run(move || exchange(&[wrong])).await;
    assert!(nak.opts().has_msg_type(MessageType::Nak));
}

async fn over_tftp(machine: &Machine) {
    for (name, options) in [(tftp::BIOS, ""), (tftp::UEFI, "blksize\x001400\0tsize\x000\0")] {
        let got = machine.run(move || fetch_by_tftp(1, name, options)).await.unwrap();
        assert_eq!(got, std::fs::read(format!("{}/{name}", super::IPXE)).unwrap(), "{name}");
    }
    assert!(machine.run(|| fetch_by_tftp(1, "../../etc/passwd", "")).await.unwrap_err().contains("no such file"));
    assert!(machine.run(|| fetch_by_tftp(2, tftp::BIOS, "")).await.unwrap_err().contains("only reading"));
}

/// As iPXE does before it goes on; the answer says that there is none, for no time.
fn ask_for_a_router() {
    let socket =
        socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::RAW, Some(socket2::Protocol::ICMPV6)).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let index = rustix::net::netdevice::name_to_index(&socket, "m0").unwrap();
    // Either end may still be checking that its address is its own: the question is asked again, as iPXE would.
    for _ in 0..60 {
        let to = std::net::SocketAddrV6::new("ff02::2".parse().unwrap(), 0, 0, index);
        let mut packet = [0; 256];
        if socket.send_to(&[133, 0, 0, 0, 0, 0, 0, 0], to).is_err() {
            std::thread::sleep(Duration::from_millis(500));
        }
        while let Ok((length, _)) = socket.recv_from(&mut packet) {
            if packet[0] == 134 {
                assert_eq!((length, &packet[5..16]), (16, &[0; 11][..]), "no flags, no lifetime");
                return;
            }
        }
    }
    panic!("nobody says that there is no router");
}

async fn scripts_and_files(bench: &Bench, machine: &Machine, url: String) {
    let get = async |url: &str| {
        let url = url.to_owned();
        machine.run(move || fetch_by_http(&url)).await
    };
    let text = |(_, body): (String, Vec<u8>)| String::from_utf8(body).unwrap();
    let waits = text(get(&url).await);
    assert!(waits.contains("has no image vmm yet") && waits.contains("chain --replace"), "{waits}");
    let kinds: Vec<_> = bench.people.pool().await.unwrap().into_iter().map(|p| (p.name, p.kind)).collect();
    let physical = |n: &str| (n.to_owned(), PoolKind::Physical);
    assert_eq!(kinds, [physical("node-1"), physical("node-2")]);
    assert_eq!(bench.people.nodes().await.unwrap()[0].state, NodeState::Blank);

    let digest = bench.push("vmm", ImageKind::Vmm).await;
    let script = text(get(&url).await);
    let token = &bench.serving.control.token;
    let http = url.split("/boot/").next().unwrap();
    let wanted = format!(
        "initrd=initrd bedplate.control={http} bedplate.token={token} bedplate.slots=8 \
         bedplate.mac=52:54:00:00:00:01 console=ttyS0 panic=-1 root=/dev/vda1 quiet ||"
    );
    assert!(script.contains(&wanted), "{script}");
    assert_eq!(bench.people.nodes().await.unwrap()[0].state, NodeState::Booting);

    let local = bedplate_images::Store::open(bench.dir.path().join("local")).unwrap();
    for part in ["kernel", "initrd"] {
        let line = script.lines().find(|line| line.starts_with(part)).unwrap();
        let url = line.split(' ').find(|word| word.starts_with("http")).unwrap();
        let (head, body) = get(url).await;
        let path = bench.dir.path().join(part);
        local.materialise(&digest, part, &path).unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        assert!(body == std::fs::read(path).unwrap(), "{part} differs");
    }
    for wrong in ["/disk?mac=52:54:00:00:00:01", "/kernel?mac=x", "/kernel", "/..%2fcontrol.redb?mac=52:54:00:00:00:01"]
    {
        let (head, _) = get(&format!("{http}/boot/{}{wrong}", digest.hex())).await;
        assert!(head.starts_with("HTTP/1.1 4"), "{wrong}: {head}");
    }
    until("the whole story", async || {
        let told: Vec<String> = bench.events().await.into_iter().map(|e| e.message).collect();
        let parts =
            ["has fetched its kernel:", "has fetched its initrd:", "iPXE took 10.77.0.10", "fetches its boot script"];
        parts.iter().all(|part| told.iter().any(|line| line.contains(part))).then_some(())
    })
    .await;
}

async fn registers(bench: &Bench, address: Ipv4Addr) {
    let mut node = SmallNode::start(&bench.serving.control.token).await;
    // It serves here; the route must lead to where the machine is.
    node.address.set_ip(address.into());
    let registered = node.register(&bench.nodes, Some("52:54:00:00:00:01")).await;
    assert_eq!((registered.name.as_str(), registered.vm_network), ("node-1", net("10.78.1.0/24")));
    let nodes = bench.people.nodes().await.unwrap();
    assert_eq!((nodes.len(), nodes[0].state, nodes[1].state), (2, NodeState::Ready, NodeState::Blank));
    let route = format!("10.78.1.0/24 via {address} dev bp");
    until("the route", async || ip("route show").contains(&route).then_some(())).await;
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/conf/bp/forwarding").unwrap().trim(), "1");
}
