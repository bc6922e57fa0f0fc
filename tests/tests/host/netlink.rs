//! The questions that are not about the state: interfaces, ways to peers, veth pairs, and many askers at once.

use super::*;

pub(crate) async fn turns() -> Outcome {
    underlay();
    let netlink = Netlink::new()?;
    let routes: Vec<Route> = (0..3000_u32)
        .map(|n| plain(&format!("10.5.{}.{}/32", n / 256, n % 256), Some("10.9.0.2"), "under0"))
        .collect();
    assert!(netlink.put_routes(&routes.iter().collect::<Vec<_>>()).await.iter().all(Result::is_ok));
    let (some, rest) = routes.split_at(500);
    let some: Vec<&Route> = some.iter().collect();
    let (links, first, removed, second, put) = tokio::join!(
        netlink.links(),
        netlink.routes(Some(ROUTE_PROTOCOL)),
        netlink.remove_routes(&some),
        netlink.routes(Some(ROUTE_PROTOCOL)),
        netlink.put_routes(&some),
    );
    assert_eq!(links?.len(), 3);
    assert!(first?.len() >= rest.len() && second?.len() >= rest.len());
    assert!(removed.iter().chain(&put).all(Result::is_ok));
    // The kernel refuses a dump while an abandoned one is still under way on the socket.
    for patience in 0..20 {
        let abandoned = netlink.routes(Some(ROUTE_PROTOCOL));
        let _ = tokio::time::timeout(Duration::from_micros(patience * 200), abandoned).await;
        assert_eq!(netlink.routes(Some(ROUTE_PROTOCOL)).await?.len(), 3000);
    }
    Ok(())
}

pub(crate) async fn list_interfaces() -> Outcome {
    underlay();
    ip("addr add 10.9.0.50/24 dev under0 valid_lft 1000 preferred_lft 0");
    ip("addr add fd00:9::50/64 dev under0 nodad valid_lft 1000 preferred_lft 500");
    let netlink = Netlink::new()?;
    let all = interfaces(&netlink).await?;
    assert!(all.is_sorted_by_key(|interface| interface.index), "in the kernel's order");
    let under0 = all.iter().find(|interface| interface.name == "under0").unwrap();
    assert_eq!((under0.mtu, under0.up), (1500, true));
    let address = |ip: &str, prefix_len, dynamic, deprecated| InterfaceAddress {
        address: ip.parse().unwrap(),
        prefix_len,
        dynamic,
        temporary: false,
        deprecated,
    };
    let global: Vec<_> = under0
        .addresses
        .iter()
        .filter(|a| !matches!(a.address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .cloned()
        .collect();
    for expected in [
        address("10.9.0.1", 24, false, false),
        address("10.9.0.50", 24, true, true),
        address("fd00:9::1", 64, false, false),
        address("fd00:9::50", 64, true, false),
    ] {
        assert!(global.contains(&expected), "{expected:?} is not in {global:?}");
    }
    assert_eq!(global.len(), 4);
    assert_eq!(global[0].address, "10.9.0.1".parse::<IpAddr>().unwrap());

    assert_eq!(facts(&netlink, &[]).await?.default_route_v4, None);
    ip("route add default via 10.9.0.254 metric 300");
    ip("route add default dev under1 metric 100");
    ip("-6 route add default via fd00:9::fe");
    let under1 = all.iter().find(|interface| interface.name == "under1").unwrap();
    let found = facts(&netlink, &[]).await?;
    assert_eq!(found.default_route_v4, Some(under1.index));
    assert_eq!(found.default_route_v6, Some(under0.index));

    let way = reach(&netlink, "10.9.0.77".parse().unwrap()).await?;
    assert_eq!(way.index, under0.index);
    assert_eq!(way.source, Some("10.9.0.1".parse().unwrap()));
    let way = reach(&netlink, "2001:db8::1".parse().unwrap()).await?;
    assert_eq!(way.index, under0.index);
    Ok(())
}

pub(crate) async fn next_hops() -> Outcome {
    underlay();
    ip("route add 192.0.2.0/24 via 10.9.0.254");
    ip("route add blackhole 203.0.113.0/24");
    let netlink = Netlink::new()?;
    let under0 = netlink.link("under0").await?.unwrap().index;
    let peers: Vec<Ipv4Addr> =
        (0..1000_u32).map(|n| Ipv4Addr::from_bits(0xc000_0200 + n % 250 + 1)).collect();
    let start = Instant::now();
    let hops = netlink.next_hops(&peers).await;
    println!("1,000 next hops in {} ms", start.elapsed().as_millis());
    let (gateway, source) = (Ipv4Addr::new(10, 9, 0, 254), Ipv4Addr::new(10, 9, 0, 1));
    let routed = NextHop { via: Some(gateway), ifindex: under0, source: Some(source) };
    assert_eq!(hops.len(), 1000);
    assert!(hops.iter().all(|hop| hop.as_ref() == Ok(&routed)), "{:?}", hops[0]);

    let odd = ["10.9.0.2", "10.9.0.1", "198.51.100.1", "203.0.113.1"].map(|ip| ip.parse().unwrap());
    let found = netlink.next_hops(&odd).await;
    assert_eq!(found[0], Ok(NextHop { via: None, ifindex: under0, source: Some(source) }));
    assert_eq!(netlink.next_hop(odd[0]).await, found[0]);
    let text = |n: usize| found[n].as_ref().unwrap_err().to_string();
    assert_eq!(text(1), "look up the route to 10.9.0.1: 10.9.0.1 is an address of this host");
    assert_eq!(
        text(2),
        "look up the route to 198.51.100.1: network is unreachable: no route of this host leads there"
    );
    assert!(text(3).starts_with("look up the route to 203.0.113.1: "), "{}", text(3));
    Ok(())
}

pub(crate) async fn veth() -> Outcome {
    let netlink = Netlink::new()?;
    netlink.create_veth("flannel0p", "flannel0g", 1472).await?;
    for name in ["flannel0p", "flannel0g"] {
        let link = netlink.link(name).await?.unwrap();
        assert_eq!((link.mtu, link.up, link.kind.as_deref()), (1472, false, Some("veth")));
        assert_eq!(link.tun, None);
        netlink.set_no_arp(name).await?;
        netlink.set_mtu(name, 1450).await?;
        netlink.set_up(name).await?;
        let link = netlink.link(name).await?.unwrap();
        assert_eq!((link.mtu, link.up), (1450, true));
        assert!(ip(&format!("-o link show {name}")).contains("NOARP"));
    }
    let again = netlink.create_veth("flannel0p", "flannel0g", 1472).await.unwrap_err().to_string();
    assert!(
        again.starts_with("create veth pair flannel0p and flannel0g with mtu 1472: file exists"),
        "{again}"
    );
    netlink.delete_link("flannel0g").await?;
    assert_eq!(netlink.link("flannel0p").await?, None);
    netlink.delete_link("flannel0g").await?;
    let gone = netlink.set_up("flannel0g").await.unwrap_err().to_string();
    assert!(gone.ends_with("there is no network device flannel0g"), "{gone}");
    assert_eq!(netlink.routes(Some(ROUTE_PROTOCOL)).await?, vec![]);
    Ok(())
}
