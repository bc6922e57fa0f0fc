{{/* The network configuration. Built as a value and printed as JSON, so that no value can make it invalid. */}}
{{- define "flannel.netConf" -}}
{{- $config := dict -}}
{{- if .Values.podCidr -}}
{{- $_ := set $config "Network" .Values.podCidr -}}
{{- else -}}
{{- $_ := set $config "EnableIPv4" false -}}
{{- end -}}
{{- if .Values.podCidrv6 -}}
{{- $_ := set $config "EnableIPv6" true -}}
{{- $_ := set $config "IPv6Network" .Values.podCidrv6 -}}
{{- end -}}
{{- $_ := set $config "EnableNFTables" .Values.flannel.enableNFTables -}}
{{- $backend := dict "Type" .Values.flannel.backend -}}
{{- $given := dict "Port" .Values.flannel.backendPort "PortV6" .Values.flannel.backendPortv6 "MTU" .Values.flannel.mtu "VNI" .Values.flannel.vni "KeepaliveInterval" .Values.flannel.keepaliveInterval -}}
{{- range $key, $value := $given -}}
{{- if $value -}}{{- $_ := set $backend $key (int $value) -}}{{- end -}}
{{- end -}}
{{- $given = dict "MacPrefix" .Values.flannel.macPrefix "PSK" .Values.flannel.psk "Mode" .Values.flannel.tunnelMode -}}
{{- range $key, $value := $given -}}
{{- if $value -}}{{- $_ := set $backend $key (toString $value) -}}{{- end -}}
{{- end -}}
{{- if .Values.flannel.GBP -}}{{- $_ := set $backend "GBP" true -}}{{- end -}}
{{- if .Values.flannel.directRouting -}}{{- $_ := set $backend "DirectRouting" true -}}{{- end -}}
{{- if eq .Values.flannel.backend "ipsec" -}}{{- $_ := required "flannel.psk: the ipsec backend needs one" .Values.flannel.psk -}}{{- end -}}
{{- $_ := set $config "Backend" $backend -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{/* How often and how long a probe asks, as it was given. */}}
{{- define "flannel.probeTimes" -}}
{{- if kindIs "map" . -}}{{- toYaml . -}}{{- else -}}periodSeconds: 10{{- end -}}
{{- end -}}
