{{/* "true" where the network policy controller is asked for, else nothing. To a template the string "false" is true. */}}
{{- define "flannel.netpolEnabled" -}}
{{- $enabled := (.Values.netpol | default dict).enabled | default false -}}
{{- if not (kindIs "bool" $enabled) -}}
{{- fail (printf "netpol.enabled: %s is neither true nor false" (toJson $enabled)) -}}
{{- end -}}
{{- if $enabled -}}true{{- end -}}
{{- end -}}

{{/* Its image. */}}
{{- define "flannel.netpolImage" -}}
{{- $image := .Values.netpol.image -}}
{{- if not (kindIs "map" $image) -}}
{{- fail (printf "netpol.image: %s is no image; it takes two fields, repository and tag" (toJson $image)) -}}
{{- end -}}
{{- if not $image.repository -}}
{{- fail (printf "netpol.image.repository: %s names no image, and netpol.enabled is true: name where your nodes get kube-network-policies from, or set netpol.enabled to false" (toJson $image.repository)) -}}
{{- end -}}
{{- if not $image.tag -}}
{{- fail (printf "netpol.image.tag: %s is no tag of %s; name one, such as v1.0.0" (toJson $image.tag) $image.repository) -}}
{{- end -}}
{{- printf "%v:%v" $image.repository $image.tag -}}
{{- end -}}

{{/* Its arguments, as a list of strings. */}}
{{- define "flannel.netpolArgs" -}}
{{- $args := .Values.netpol.args -}}
{{- if not (kindIs "slice" $args) -}}
{{- fail (printf "netpol.args: %s is no list; it takes one argument an entry, such as [\"--v=2\"]" (toJson $args)) -}}
{{- end -}}
{{- $strings := list -}}
{{- range $index, $arg := $args -}}
{{- if or (kindIs "map" $arg) (kindIs "slice" $arg) (kindIs "invalid" $arg) -}}
{{- fail (printf "netpol.args[%d]: %s is no argument; it takes a string, such as \"--v=2\"" $index (toJson $arg)) -}}
{{- end -}}
{{- $strings = append $strings (toString $arg) -}}
{{- end -}}
{{- toJson $strings -}}
{{- end -}}
