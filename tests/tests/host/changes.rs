//! Items put, replaced and removed, one by one and by the thousand, and what failures say.

use super::*;

pub(crate) async fn put_observe_remove() -> Outcome {
    underlay();
    let mut host = host()?;
    let wanted = state([
        tun(),
        HostItem::Sysctl(Sysctl { key: "net/ipv4/conf/flannel0/rp_filter".into(), value: "2".into() }),
        address("10.5.3.0/32"),
        HostItem::Route(plain("10.5.0.0/16", None, "flannel0")),
        route("10.5.9.0/24", "10.9.0.2"),
    ]);
    assert_eq!(host.observe().await?, HostState::new());
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);

    // A second opinion, and what is in no item: protocol, scope, label, broadcast address.
    let routes = ip("-N -details route show table main");
    assert!(routes.contains("1 10.5.0.0/16 dev flannel0 proto 85 scope 0"), "{routes}");
    assert!(routes.contains("1 10.5.9.0/24 via 10.9.0.2 dev under0 proto 85 scope 0"), "{routes}");
    let addresses = ip("-o -4 addr show dev flannel0");
    assert!(addresses.contains("inet 10.5.3.0/32 scope global flannel0"), "{addresses}");
    assert!(!addresses.contains("brd"), "{addresses}");

    // Putting again changes nothing and is no error.
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);

    let removals = wanted.changes_to(&HostState::new());
    assert!(host.apply(&removals).await.iter().all(Result::is_ok));
    assert_eq!(host.observe().await?, HostState::new());
    assert!(!ip("-o link").contains("flannel0"));
    // What is gone already is removed, all the same.
    for (change, result) in removals.iter().zip(host.apply(&removals).await) {
        assert_eq!(result, Ok(()), "{change}");
    }
    Ok(())
}

pub(crate) async fn moved_route() -> Outcome {
    underlay();
    let mut host = host()?;
    let before = state([route("10.5.9.0/24", "10.9.0.2"), route("fd00:5:9::/64", "fd00:9::2")]);
    let after = state([route("10.5.9.0/24", "10.9.0.3"), route("fd00:5:9::/64", "fd00:9::3")]);
    go(&mut host, &HostState::new(), &before).await;
    let monitor = Monitor::start();
    go(&mut host, &before, &after).await;
    let news = monitor.lines();
    assert!(news.iter().any(|line| line.contains("10.5.9.0/24 via 10.9.0.3")), "{news:?}");
    assert!(news.iter().any(|line| line.contains("fd00:5:9::/64 via fd00:9::3")), "{news:?}");
    assert!(!news.iter().any(|line| line.contains("Deleted")), "{news:?}");
    assert_eq!(host.observe().await?, after);
    Ok(())
}

pub(crate) async fn device_repair() -> Outcome {
    let mut host = host()?;
    let wanted =
        state([tun(), address("10.5.3.0/32"), HostItem::Route(plain("10.5.0.0/16", None, "flannel0"))]);
    go(&mut host, &HostState::new(), &wanted).await;
    for damage in ["link set flannel0 mtu 1400", "link set flannel0 down"] {
        ip(damage);
        let found = host.observe().await?;
        assert!(!found.contains(&tun()), "after `ip {damage}`");
        go(&mut host, &found, &wanted).await;
        assert_eq!(host.observe().await?, wanted, "after the repair of `ip {damage}`");
    }
    Ok(())
}

pub(crate) async fn five_thousand() -> Outcome {
    underlay();
    let mut host = host()?;
    let via = |last: u32| {
        state(
            (0..5000_u32)
                .map(|n| route(&format!("10.5.{}.{}/32", n / 256, n % 256), &format!("10.9.0.{last}"))),
        )
    };
    let (first, second, none) = (via(2), via(3), HostState::new());
    for (what, from, to) in [("put", &none, &first), ("moved", &first, &second), ("removed", &second, &none)]
    {
        let start = Instant::now();
        go(&mut host, from, to).await;
        let changed = start.elapsed();
        let start = Instant::now();
        assert_eq!(&host.observe().await?, to);
        println!(
            "5,000 routes {what} in {} ms, observed in {} ms",
            changed.as_millis(),
            start.elapsed().as_millis()
        );
    }
    Ok(())
}

pub(crate) async fn ipv6() -> Outcome {
    underlay();
    let mut host = host()?;
    let wanted = state([
        tun(),
        address("fd00:5:3::/128"),
        HostItem::Route(plain("fd00:5::/32", None, "flannel0")),
        route("fd00:5:9::/64", "fd00:9::2"),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted, "the kernel's own link-local address is left out");
    let routes = ip("-6 -N route show table main");
    assert!(routes.contains("fd00:5:9::/64 via fd00:9::2 dev under0 proto 85"), "{routes}");
    quiet(&mut host).await;
    ip("-6 route del fd00:5:9::/64");
    assert!(tokio::time::timeout(Duration::from_secs(1), host.news()).await.is_ok());
    let found = host.observe().await?;
    assert_eq!(found.len(), 3);
    go(&mut host, &found, &wanted).await;
    go(&mut host, &wanted, &HostState::new()).await;
    assert_eq!(host.observe().await?, HostState::new());
    Ok(())
}

pub(crate) async fn route_fields() -> Outcome {
    underlay();
    let mut host = host()?;
    let full = |destination: &str, via: &str, source: &str| {
        HostItem::Route(Route {
            onlink: true,
            source: Some(source.parse().unwrap()),
            mtu: Some(1400),
            ..plain(destination, Some(via), "under0")
        })
    };
    let wanted = state([
        full("10.5.9.0/24", "203.0.113.9", "10.9.0.1"),
        full("fd00:5:9::/64", "fd00:99::9", "fd00:9::1"),
        HostItem::Route(plain("10.5.10.0/24", Some("fd00:9::2"), "under0")),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);
    Ok(())
}

pub(crate) async fn failures() -> Outcome {
    underlay();
    let mut host = host()?;
    let good = route("10.5.9.0/24", "10.9.0.2");
    let gone = HostItem::Address(Address { device: "gone0".into(), net: "10.5.3.0/32".parse().unwrap() });
    let changes = [
        route("10.5.7.0/24", "203.0.113.7"),
        good.clone(),
        HostItem::Route(plain("10.5.8.0/24", None, "gone0")),
        gone,
        HostItem::Sysctl(Sysctl { key: "net/ipv4/conf/gone0/rp_filter".into(), value: "1".into() }),
        HostItem::Sysctl(Sysctl { key: "net/ipv4/conf/lo/rp_filter".into(), value: "many".into() }),
        HostItem::Link(Link { name: "sixteen-bytes-xx".into(), kind: LinkKind::Tun, mtu: 1472 }),
    ]
    .map(Change::Put);
    let results = host.apply(&changes).await;
    let texts: Vec<String> =
        results.into_iter().map(|r| r.err().map(|e| e.to_string()).unwrap_or_default()).collect();
    let expected = [
        "put route 10.5.7.0/24 via 203.0.113.7 dev under0: network is unreachable (the kernel says: Nexthop has invalid \
         gateway): gateway 203.0.113.7 must be on a network of under0 itself",
        "",
        "put route 10.5.8.0/24 dev gone0: there is no network device gone0",
        "put addr 10.5.3.0/32 dev gone0: there is no network device gone0",
        "put sysctl net/ipv4/conf/gone0/rp_filter=1: no such file or directory: the device is gone, or this kernel \
         lacks the feature (is IPv6 off, a module missing?)",
        "put sysctl net/ipv4/conf/lo/rp_filter=many: invalid argument: the kernel does not take this value",
    ];
    assert_eq!(texts[..6], expected);
    assert!(!texts[6].is_empty(), "a name that is too long");

    std::fs::write("/proc/sys/net/ipv6/conf/under0/disable_ipv6", "1").unwrap();
    let on_under0 =
        HostItem::Address(Address { device: "under0".into(), net: "fd00:9::7/64".parse().unwrap() });
    let results = host.apply(&[Change::Put(on_under0)]).await;
    let text = results[0].as_ref().unwrap_err().to_string();
    assert!(text.ends_with("IPv6 is switched off on under0"), "{text}");
    assert_eq!(host.observe().await?, state([good]));
    Ok(())
}

pub(crate) async fn mapping() -> Outcome {
    underlay();
    let mut host = host()?;
    let bad = |n: u32| n % 3 == 1;
    let changes: Vec<Change> = (0..450_u32)
        .map(|n| {
            let via = if bad(n) { "203.0.113.7" } else { "10.9.0.2" };
            Change::Put(route(&format!("10.5.{}.{}/32", n / 256, n % 256), via))
        })
        .collect();
    for ((n, change), result) in (0..).zip(&changes).zip(host.apply(&changes).await) {
        assert_eq!(result.is_err(), bad(n), "{change}: {result:?}");
        if let Err(error) = result {
            assert!(error.to_string().starts_with(&change.to_string()), "{error} is not about {change}");
        }
    }
    assert_eq!(host.observe().await?.len(), 300);
    Ok(())
}

pub(crate) async fn unprivileged() -> Outcome {
    underlay();
    // All capabilities, of this thread only, which ends with the test (capset(2), version 3).
    let header = [0x2008_0522_u32, 0];
    let none = [0_u32; 6];
    // SAFETY: both have the layout of capset's arguments and live during the call.
    let dropped = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(dropped, 0);
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new(), "looking needs no privilege");
    let results = host.apply(&[Change::Put(route("10.5.9.0/24", "10.9.0.2"))]).await;
    assert_eq!(
        results[0].as_ref().unwrap_err().to_string(),
        "put route 10.5.9.0/24 via 10.9.0.2 dev under0: operation not permitted: needs CAP_NET_ADMIN"
    );
    Ok(())
}

/// In user space, so that it needs no eBPF object; the other tiers are `tests/tunnel`'s.
pub(crate) async fn tunnel() -> Outcome {
    underlay();
    let bpffs = tempfile::tempdir().unwrap();
    let scope = Scope { devices: vec!["flannel0".into()], networks: vec!["10.5.0.0/16".parse().unwrap()] };
    let mut host = LinuxHost::new(scope, LinuxHostOptions { bpffs: bpffs.path().to_owned() })?;
    let tunnel = Tunnel {
        device: "flannel0".into(),
        underlay: "under0".into(),
        local: Ipv4Addr::new(10, 9, 0, 1),
        port: 8285,
        network: "10.5.0.0/16".parse().unwrap(),
        own_subnet: "10.5.3.0/24".parse().unwrap(),
        mtu: 1472,
        options: TunnelOptions { datapath: Datapath::Tun, ..TunnelOptions::default() },
    };
    let peer = |n: u8| {
        HostItem::TunnelPeer(TunnelPeer {
            device: "flannel0".into(),
            subnet: format!("10.5.{n}.0/24").parse().unwrap(),
            node: Ipv4Addr::new(10, 9, 0, n),
        })
    };
    let wanted = state([
        tun(),
        address("10.5.3.0/32"),
        HostItem::Tunnel(tunnel),
        peer(4),
        peer(5),
        HostItem::Route(plain("10.5.0.0/16", None, "flannel0")),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);
    assert_eq!(host.reports().len(), 1);

    let without = state(wanted.iter().filter(|item| **item != peer(5)).cloned());
    go(&mut host, &wanted, &without).await;
    assert_eq!(host.observe().await?, without);

    quiet(&mut host).await;
    ip("link del flannel0");
    assert!(tokio::time::timeout(Duration::from_secs(1), host.news()).await.is_ok());
    let found = host.observe().await?;
    assert!(!found.contains(&tun()));
    go(&mut host, &found, &without).await;
    assert_eq!(host.observe().await?, without, "after the repair");

    go(&mut host, &without, &HostState::new()).await;
    assert_eq!(host.observe().await?, HostState::new());
    Ok(())
}
