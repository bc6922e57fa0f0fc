//! Start, end, and what may happen to the device in between.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use flannel_agent::{
    domain::host_state::SourceCheck,
    host::udp::userspace::{Role, ensure_device},
};

use crate::{
    rig::{self, A, B, DEVICE, Half, Rig, config, drops, eventually, start},
    traffic::{echo, tcp_both_ways},
};

pub(crate) fn a_taken_port_is_an_error_that_names_it() -> Result<()> {
    let rig = Rig::new()?;
    let _first = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath))?;
    let Err(error) = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath)) else {
        return Err(anyhow!("a second tunnel on the same port"));
    };
    let error = error.to_string();
    for part in ["10.99.0.11:8285", "EADDRINUSE", "stop it"] {
        ensure!(error.contains(part), "{error}");
    }
    Ok(())
}

pub(crate) fn a_restarted_tunnel_takes_the_same_device_over() -> Result<()> {
    let (rig, a, _b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    echo(&client, &server)?;
    let index = || rig.a.run(|| nix::net::if_::if_nametoindex(DEVICE));
    let before = index()?;
    drop(a);
    assert_eq!(index()?, before, "the device stays");
    rig.a.run(|| ensure_device(DEVICE))?;
    assert_eq!(index()?, before, "and is taken over");
    let a = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath))?;
    a.set_peers(vec![(B.lease(), B.node)]);
    echo(&client, &server)?;
    // Beside a running tunnel it changes nothing.
    rig.a.run(|| ensure_device(DEVICE))?;
    echo(&client, &server)?;
    tcp_both_ways(&rig, 1 << 20)
}

pub(crate) fn a_device_that_was_down_carries_packets_again() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    rig.b.ip(&format!("link set {DEVICE} down"))?;
    let client = rig::udp(&rig.a, A.pod, 7000)?;
    client.send_to(b"lost", (B.pod, 7001))?;
    eventually("the packet can't be delivered", || drops(&b) == [("send_failed", 1)])?;
    rig.b.ip(&format!("link set {DEVICE} up"))?;
    rig.b.ip(&format!("route add 10.244.0.0/16 dev {DEVICE} src {}", B.pod))?;
    for tunnel in [&a, &b] {
        tunnel.is_running().map_err(|e| anyhow!(e))?;
    }
    echo(&client, &rig::udp(&rig.b, B.pod, 7001)?)
}

pub(crate) fn a_deleted_device_ends_the_tunnel() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    half.tunnel.is_running().map_err(|e| anyhow!(e))?;
    half.rig.a.ip(&format!("link delete {DEVICE}"))?;
    eventually("the tunnel says so", || half.tunnel.is_running().is_err())?;
    let reason = half.tunnel.is_running().err().unwrap_or_default();
    ensure!(reason.contains("flannel0") && reason.contains("deleted"), "{reason}");

    let Err(error) = start(&half.rig.a, config(A, SourceCheck::Enforce, Role::WholePath)) else {
        return Err(anyhow!("started without a device"));
    };
    ensure!(error.to_string().contains("flannel0: the device does not exist"), "{error}");
    Ok(())
}

pub(crate) fn a_device_of_another_kind_is_refused() -> Result<()> {
    let rig = Rig::new()?;
    for (create, kind) in [
        ("tuntap add other mode tun", "a TUN device without IFF_MULTI_QUEUE"),
        ("tuntap add other mode tap multi_queue", "a TAP device"),
        ("link add other type bridge", "a bridge device"),
        ("link add other type veth peer name end", "a veth device"),
    ] {
        rig.a.ip(create)?;
        let Err(error) = rig.a.run(|| ensure_device("other")) else {
            return Err(anyhow!("{create}: taken over"));
        };
        let error = error.to_string();
        ensure!(error.contains(kind) && error.contains("ip link delete other"), "{create}: {error}");
        rig.a.ip("link delete other")?;
    }
    Ok(())
}

pub(crate) fn a_tunnel_stops_promptly_under_load() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let deadline = Instant::now() + Duration::from_secs(2);
    let floods: Vec<_> = [(&rig.a, A, B), (&rig.b, B, A)]
        .into_iter()
        .map(|(node, own, peer)| {
            let socket = rig::udp(node, own.pod, 7000)?;
            Ok(thread::spawn(move || {
                while Instant::now() < deadline {
                    let _ = socket.send_to(&[7; 64], (peer.pod, 9));
                }
            }))
        })
        .collect::<Result<_>>()?;
    thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    drop((a, b));
    let took = begin.elapsed();
    for flood in floods {
        flood.join().map_err(|_| anyhow!("the flood panicked"))?;
    }
    ensure!(took < Duration::from_secs(1), "took {took:?}");
    Ok(())
}
