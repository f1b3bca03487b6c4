-- Named network policies for microVMs. `none` is built in: no network interface at all.
return {}
