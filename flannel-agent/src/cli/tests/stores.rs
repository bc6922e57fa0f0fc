//! Where leases come from, and where they are served.

use super::*;
use crate::domain::lease::Reservation;

#[test]
fn kubernetes_takes_its_flags_and_the_pods_variables() {
    let kube = |text: &str| match settings(text).store {
        StoreSettings::Kube(kube) => kube,
        other => panic!("{text}: {other:?}"),
    };
    let plain = kube("NODE_NAME=h1 flanneld -kube-subnet-mgr");
    assert_eq!(
        plain,
        KubeSettings {
            api_url: None,
            kubeconfig: None,
            annotation_prefix: "flannel.alpha.coreos.com".into(),
            net_config: "/etc/kube-flannel/net-conf.json".into(),
            set_network_unavailable: true,
            node: Some("h1".into()),
            pod: None,
        }
    );
    let other = kube(
        "POD_NAME=p POD_NAMESPACE=kube-flannel NODE_NAME= FLANNELD_KUBECONFIG_FILE=/etc/k flanneld \
         --kube-subnet-mgr=true --kube-api-url https://10.0.0.1:6443 -kube-annotation-prefix=example.com/blue \
         -net-config-path=/n.json -set-node-network-unavailable=false",
    );
    assert_eq!(
        other,
        KubeSettings {
            api_url: Some("https://10.0.0.1:6443".into()),
            kubeconfig: Some("/etc/k".into()),
            annotation_prefix: "example.com/blue".into(),
            net_config: "/n.json".into(),
            set_network_unavailable: false,
            node: None,
            pod: Some(("p".into(), "kube-flannel".into())),
        }
    );
    let idle = settings("FLANNELD_KUBE_API_URL=https://a flanneld -set-node-network-unavailable=0");
    assert!(matches!(idle.store, StoreSettings::Etcd(_)));
    assert_eq!(
        idle.warnings,
        [
            "FLANNELD_KUBE_API_URL has no effect without -kube-subnet-mgr",
            "-set-node-network-unavailable has no effect without -kube-subnet-mgr"
        ]
    );
}

#[test]
fn a_client_names_its_servers() {
    let StoreSettings::Remote(remote) = settings("flanneld -remote 10.0.0.1:8888,10.0.0.2:8888").store else {
        panic!()
    };
    assert_eq!(remote.servers, ["10.0.0.1:8888", "10.0.0.2:8888"]);
    assert_eq!((remote.ca_file, remote.identity), (None, None));
    let tls = "FLANNELD_REMOTE=a:1 flanneld -remote-cafile ca -remote-certfile c -remote-keyfile k";
    let StoreSettings::Remote(remote) = settings(tls).store else { panic!() };
    assert_eq!(remote.ca_file, Some("ca".into()));
    let identity = ClientCertificate { cert_file: "c".into(), key_file: "k".into() };
    assert_eq!(remote.identity, Some(identity));
}

#[test]
fn a_server_has_etcd_or_a_file() {
    let on_etcd = settings("flanneld -listen=:8888");
    assert!(matches!(on_etcd.store, StoreSettings::Etcd(_)));
    assert_eq!(on_etcd.serve.unwrap().listen, ":8888");
    for (flags, path, net_config) in [
        ("-store=embedded", "/var/lib/flannel/leases.redb", "/etc/flannel/net-conf.json"),
        ("-store embedded:/srv/l -net-config-path=/srv/nets", "/srv/l", "/srv/nets"),
    ] {
        let on_file = settings(&format!("flanneld -listen=:8888 {flags}"));
        let wanted = EmbeddedSettings { path: path.into(), net_config: net_config.into() };
        assert_eq!(on_file.store, StoreSettings::Embedded(wanted));
        assert_eq!(on_file.warnings, Vec::<String>::new());
    }
}

#[test]
fn what_contradicts_itself_is_refused() {
    refused(&[
        (
            "flanneld -listen=:1 -kube-subnet-mgr",
            "-kube-subnet-mgr and -listen: leases come from Kubernetes or from a server, not both",
        ),
        (
            "flanneld -store=embedded",
            "invalid value \"embedded\" for -store: needs -listen: the file is one server's, and nodes lease from that \
             server with -remote",
        ),
        (
            "flanneld -listen=:1 -store=embedded:leases",
            "invalid value \"embedded:leases\" for -store: must be etcd, embedded, or embedded:/path/of/a/file",
        ),
        (
            "flanneld -listen=:1 -store=redis",
            "invalid value \"redis\" for -store: must be etcd, embedded, or embedded:/path/of/a/file",
        ),
        (
            "flanneld -listen=:1 -remote-cafile=ca",
            "-remote-cafile is given without -remote-certfile: clients are asked for certificates over TLS, which needs \
             one here",
        ),
        (
            "flanneld -listen=:1 -networks=blue",
            "-listen \":1\" serves every network there is, leave -networks out",
        ),
        (
            "flanneld -kube-subnet-mgr -watch-networks",
            "-kube-subnet-mgr leases from one network, leave -watch-networks out",
        ),
        (
            "flanneld -remote=http://root:s3cret@10.0.0.1:8888",
            "-remote names a user, which the protocol does not know; a client is known by -remote-certfile",
        ),
        (
            "flanneld -kube-subnet-mgr -kube-api-url=https://root:s3cret@10.0.0.1:6443",
            "-kube-api-url names a user; credentials are read from -kubeconfig-file",
        ),
        (
            "flanneld -networks=,",
            "invalid value \",\" for -networks: names no network; names are such as blue,red",
        ),
        (
            "flanneld -networks=blue,../etc",
            "invalid value \"blue,../etc\" for -networks: network name \"../etc\" begins with a dot; a name is such as \
             blue",
        ),
    ]);
    // With flanneld's exit code.
    for (flags, wanted) in [
        (
            "-listen=:1 -remote=a:1",
            "-listen and -remote: a server has its leases from a store, not from another server",
        ),
        (
            "-remote=a:1 -remote-keyfile=k",
            "-remote-keyfile is given without -remote-certfile: a certificate needs its key",
        ),
    ] {
        assert_eq!(printed(&format!("flanneld {flags}")), (wanted.to_owned(), Stream::Stderr, 1));
    }
}

#[test]
fn what_has_no_effect_is_named() {
    for (flags, wanted) in [
        ("flanneld -remote=a:1 -etcd-prefix=/x", "-etcd-prefix has no effect with -remote"),
        (
            "FLANNELD_ETCD_API=v2 flanneld -kube-subnet-mgr",
            "FLANNELD_ETCD_API has no effect with -kube-subnet-mgr",
        ),
        (
            "flanneld -listen=:1 -store=embedded -etcd-endpoints=http://a:1",
            "-etcd-endpoints has no effect with -store=embedded",
        ),
        ("flanneld -listen=:1 -iface=eth0", "-iface has no effect with -listen: a server joins no network"),
        (
            "flanneld -listen=:1 -udp-mtu=1400",
            "-udp-mtu has no effect with -listen: a server joins no network",
        ),
        (
            "flanneld -watch-networks -subnet-file=/x",
            "-subnet-file has no effect with several networks: each has its file in -subnet-dir",
        ),
    ] {
        assert_eq!(settings(flags).warnings, [wanted], "{flags}");
    }
}

#[test]
fn several_networks_are_named_or_followed() {
    let networks = |text: &str| settings(text).networks.expect(text);
    let named = networks("flanneld -networks=blue,red, -subnet-dir=/n");
    assert_eq!(named.allowed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["blue", "red"]);
    assert_eq!((named.watch, named.subnet_dir), (false, "/n".into()));
    let followed = networks("FLANNELD_WATCH_NETWORKS=true flanneld");
    assert_eq!((followed.allowed.len(), followed.watch), (0, true));
    let idle = settings("flanneld -subnet-dir=/n -remote-cafile=c");
    assert_eq!(idle.networks, None);
    assert_eq!(
        idle.warnings,
        [
            "-remote-cafile has no effect without -listen or -remote",
            "-subnet-dir has no effect without -networks or -watch-networks"
        ]
    );
}

#[test]
fn reservations_take_the_daemons_flags_about_the_store() {
    let command = |text: &str| match line(text) {
        Parsed::Command(Command::Reservations(command)) => command,
        other => panic!("{text}: {other:?}"),
    };
    let add = command(
        "FLANNELD_ETCD_PASSWORD=p flannel-agent reservations add 10.1.2.0/24 192.0.2.1 --network blue -etcd-username=u",
    );
    let reservation =
        Reservation { subnets: "10.1.2.0-24".parse().unwrap(), public_ip: "192.0.2.1".parse().unwrap() };
    assert_eq!(add.action, ReservationsAction::Add(reservation));
    assert_eq!(add.network, "blue".parse().ok());
    let StoreSettings::Etcd(etcd) = *add.store else { panic!() };
    assert_eq!(etcd.login.unwrap().password.expose(), "p");
    let list = command("flannel-agent reservations list --remote=a:1 --json");
    assert_eq!(list.action, ReservationsAction::List { json: true });
    assert!(matches!(*list.store, StoreSettings::Remote(_)));
    let remove = command("flannel-agent reservations remove 10.1.2.0-24&fd00::-64");
    assert_eq!(remove.action, ReservationsAction::Remove("10.1.2.0-24&fd00::-64".parse().unwrap()));
    refused(&[
        ("flannel-agent reservations show", "\"show\" is none of list, add and remove"),
        ("flannel-agent reservations add 10.1.2.0/24", "PUBLIC_IP is missing"),
        (
            "flannel-agent reservations add 10.1.2.0/24 here",
            "PUBLIC_IP \"here\" is no address, such as 192.0.2.1",
        ),
        (
            "flannel-agent reservations list --network=../x",
            "--network: network name \"../x\" begins with a dot; a name is such as blue",
        ),
        ("flannel-agent reservations list -no-such", "flag provided but not defined: -no-such"),
    ]);
}

#[test]
fn migrate_wants_two_places() {
    let Parsed::Command(Command::Migrate(command)) =
        line("flannel-agent migrate --from=embedded:/f --to etcd --dry-run -etcd-prefix=/x")
    else {
        panic!()
    };
    assert_eq!((command.from, command.to), (Place::Embedded("/f".into()), Place::Etcd));
    assert!(command.dry_run);
    let StoreSettings::Etcd(etcd) = *command.store else { panic!() };
    assert_eq!(etcd.prefix, "/x");
    refused(&[
        ("flannel-agent migrate --from=etcd", "--to is missing: etcd, or embedded:FILE"),
        ("flannel-agent migrate --from=etcd --to=etcd", "--from and --to are the same"),
        (
            "flannel-agent migrate --from=etcd --to=redis",
            "--to is \"redis\": must be etcd, or embedded:/path/of/a/file",
        ),
    ]);
}

#[test]
fn migrate_etcd_is_about_both_keyspaces() {
    let command = |text: &str| match line(text) {
        Parsed::Command(Command::MigrateEtcd(command)) => command,
        other => panic!("{text}: {other:?}"),
    };
    let plain = command("FLANNELD_ETCD_USERNAME=u FLANNELD_ETCD_PASSWORD=p flannel-agent migrate-etcd");
    assert_eq!((plain.dry_run, plain.follow), (false, false));
    assert_eq!(plain.etcd.login.unwrap().username, "u");
    let all = command("flannel-agent migrate-etcd -etcd-prefix=/x --follow --etcd-endpoints http://a:1");
    assert_eq!((all.follow, all.etcd.prefix.as_str()), (true, "/x"));
    assert!(command("flannel-agent migrate-etcd --dry-run").dry_run);
    refused(&[
        (
            "flannel-agent migrate-etcd --dry-run --follow",
            "--dry-run changes nothing, so there is nothing to --follow",
        ),
        ("FLANNELD_ETCD_API=v3 flannel-agent migrate-etcd", "leave out -etcd-api: both keyspaces are meant"),
        (
            "flannel-agent migrate-etcd -remote=a:1",
            "leave out what names another store: both keyspaces of an etcd are meant",
        ),
        (
            "flannel-agent migrate-etcd -etcd-endpoint=a:1",
            "flag provided but not defined: -etcd-endpoint (did you mean -etcd-endpoints?)",
        ),
    ]);
    let (text, stream, code) = printed("flannel-agent help migrate-etcd");
    assert!(text.contains("v2 keyspace") && stream == Stream::Stdout && code == 0);
}
