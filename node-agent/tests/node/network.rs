//! Bridge, taps and DHCP in a network namespace of this test's own: the kernel's, not ours, does the work.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Command;

use bedplate_api::{NodeId, VmId};
use bedplate_node::identity::format_mac;
use bedplate_node::net::dhcp::client::Client;
use bedplate_node::net::dhcp::exchange::Grant;
use bedplate_node::net::link::Links;
use bedplate_node::net::vms::{BRIDGE, VmNetwork};
use bedplate_node::net::{addresses, tap};
use tokio::sync::mpsc;

/// Runs `test` on a thread in a fresh network namespace, which is gone with the thread.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a network namespace needs root");
        return;
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: only the network namespace of this thread changes; no memory and no descriptor is shared anew.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}

fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().unwrap();
    assert!(status.success(), "ip {args}");
}

async fn names() -> BTreeSet<String> {
    Links::open().unwrap().all().await.unwrap().into_iter().map(|l| l.name).collect()
}

/// A DHCP client on a thread in another namespace, on an interface called `guest` that is moved there.
struct Guest {
    thread: i32,
    questions: mpsc::UnboundedSender<()>,
    answers: mpsc::UnboundedReceiver<Option<Grant>>,
}

impl Guest {
    fn begin(mac: [u8; 6]) -> Self {
        let (tell, told) = std::sync::mpsc::channel();
        let (questions, mut asked) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            // SAFETY: as in `in_namespace`.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                while let Some(()) = asked.recv().await {
                    let links = Links::open().unwrap();
                    links.up(&links.find("guest").await.unwrap().unwrap()).await.unwrap();
                    answer.send(Client::open("guest", mac).unwrap().acquire().await.unwrap()).unwrap();
                }
            });
        });
        Self { thread: told.recv().unwrap(), questions, answers }
    }

    async fn ask(&mut self) -> Option<Grant> {
        self.questions.send(()).unwrap();
        self.answers.recv().await.unwrap()
    }
}

#[test]
fn a_guest_takes_the_address_that_its_vm_has() {
    in_namespace(async || {
        let network = addresses::parse("10.99.7.0/24").unwrap();
        let (taken, mut takers) = mpsc::channel(4);
        let vms = VmNetwork::open(NodeId::random(), network, taken).await.unwrap();
        let links = Links::open().unwrap();
        let bridge = links.find(BRIDGE).await.unwrap().unwrap();
        assert_eq!(links.addresses(&bridge).await.unwrap()[0].address, Ipv4Addr::new(10, 99, 7, 1));

        // A cable instead of a guest: one end on the bridge, the other, with the guest's MAC address, elsewhere.
        let id = VmId::random();
        let mac = tap::guest_mac(id);
        let mut guest = Guest::begin(mac);
        ip(&format!("link add guest address {} type veth peer name port", format_mac(mac)));
        ip(&format!("link set port master {BRIDGE} up"));
        ip(&format!("link set guest netns {}", guest.thread));
        let address = Ipv4Addr::new(10, 99, 7, 2);
        vms.serve([(id, "web-1".to_owned(), address)].into_iter());
        let grant = loop {
            // The bridge may take a moment to carry.
            if let Some(grant) = guest.ask().await {
                break grant;
            }
        };
        assert_eq!((grant.address.address, grant.gateway), (address, Some(Ipv4Addr::new(10, 99, 7, 1))));
        assert_eq!(takers.recv().await, Some(mac));

        // A stranger on the same bridge gets nothing.
        vms.serve(std::iter::empty());
        assert_eq!(guest.ask().await, None);
    });
}

#[test]
fn what_is_there_is_taken_over_and_what_is_nobodys_is_removed() {
    in_namespace(async || {
        let network = addresses::parse("10.99.8.0/29").unwrap();
        let node = NodeId::random();
        let (stays, goes) = (VmId::random(), VmId::random());
        {
            let (taken, _takers) = mpsc::channel(1);
            let vms = VmNetwork::open(node, network, taken).await.unwrap();
            for (n, id) in [(2, stays), (3, goes)] {
                let nic = vms.attach(id, n, Ipv4Addr::new(10, 99, 8, n)).await.unwrap();
                assert_eq!(nic.tap, tap::name(id));
            }
        }
        // The agent was killed and is back, with another network.
        let (taken, _takers) = mpsc::channel(1);
        let moved = addresses::parse("10.99.9.0/29").unwrap();
        let vms = VmNetwork::open(node, moved, taken).await.unwrap();
        let links = Links::open().unwrap();
        let bridge = links.find(BRIDGE).await.unwrap().unwrap();
        let held: Vec<_> = links.addresses(&bridge).await.unwrap().into_iter().map(|a| a.address).collect();
        assert_eq!(held, [Ipv4Addr::new(10, 99, 9, 1)]);
        assert!(names().await.is_superset(&[tap::name(stays), tap::name(goes)].into()));
        vms.sweep(&[stays].into()).await.unwrap();
        let left = names().await;
        assert!(left.contains(&tap::name(stays)) && !left.contains(&tap::name(goes)), "{left:?}");
        let address = Ipv4Addr::new(10, 99, 9, 2);
        vms.attach(stays, 1, address).await.unwrap();
        vms.detach(stays, Some(address)).await.unwrap();
        vms.detach(stays, Some(address)).await.unwrap();
        assert!(!names().await.contains(&tap::name(stays)));
    });
}
