"""Small files that Keras 3.15.1 wrote, and what tests of HDF5 files share.

How they were made: ``MODEL`` is a functional model called ``net`` of Dense ``first``,
BatchNormalization ``norm``, a frozen Dense ``kept``, a Sequential ``inner`` of a BatchNormalization
without beta, and Dense ``last``, compiled with SGD and trained for three steps. ``SUBCLASSED`` is a
subclassed model with a Dense ``d`` and four BatchNormalizations: ``bn_first``, ``plain``, ``auto``
(the only one without a name of its own) and ``few`` (without gamma). ``BFLOAT16`` is a Sequential
of Dense ``first`` and BatchNormalization ``norm`` under the policy bfloat16.
"""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np

from ema_cli.blueprint import COPY, Draft, Entry, entry_of
from ema_cli.formats import hdf5
from ema_cli.tensors import DTYPES, Checkpoint, Extent, Index, Stamp, Tensor

_MODEL_KERAS = (
    "c-rk<Uu+b|8Q=3CxR9bcG7<)na9o4pv~b*=0o&BgIl<s7P%s6QO9?FFyE)(Dz1?GX&)85GKeUn~RS`<1#%lY3)Jo-{"
    "RZ-Ok9?~?eP{mV|hpMR}MRFw`c&bnoMN!o%o!Ona+nwFL+cU@67tbf3=4R%bf8TubeZQHV^-Ub_?Ajt&v`hHJhzyRR"
    "Z}_treTvWkIbeX;WnERSN2j3%ba4i1x}+-6Ly_n}EO8)~i0+9*5f>D7FavWqJsD3P+?z=3O(sW^1BV8ZhZ6DV{Dh;a"
    "_j^CS_t6ePz@Mj4N>)|!(iCZ^sOHKt#5I{s#&j(kLupXfWBIa@HBj?F#?5ABpzERniYD_>XP#LjO1~bZ3<@-Gj-dfb"
    "0h4A6hE|3sNd|LhSSWtp-8#v0HTP|$R5niFOs2U>U}OuTUH~P`cU~#W@}5ZY0v3}oXQoB-vI>lWBrd3zfTrWbJdkzV"
    "7Y$5JnR28Fv_T0sD4N|7O{uFTGF-wtk4wWTNjIPdbF`yY`~I~^%A{IW5Id5vDS`{Ap5S5_g9_@tx4`p~ru&JU%EHx>"
    "M-yie>x3#x**U+4h&=rzfOE=<WZ)4d(RYAUWd;~TlVwSPz?{dj4#i0c=+%y*PAO0pB~(}fvUCm2w@0sIwtSBvjLWK~"
    "8s`)#uWChR5IQuco6M6nKVa6J3zDXm4JNVnK=A+`v%}wmnyNcHTDwgmCd5#dfks*-{WtsLnL|pUMs!n045pA*#+5Qq"
    "4C$IVd19q|wWWgVD@$@tw8`C)v}>Kt+ZIbjfnAH_dK73=<eO7+qG%aP11$_y6Ge8m1KI_vk^&lws?A}3*UF8fzYFv8"
    "xPs}cq&L@5yrJd$3N}_Jky2t!u-1c*@g$17`b!xb%>uxQ>f~jZHAD$7pTxlM(D1-ue0V51lt?6TaWE@kne0uV??tr;"
    "6{B24@px=_7^T3HF3INdkH_M1%#%eNrgD;T=~-YO<|J~5tzK1Apjdp|Mo%fQp*D-^jHFD7MF^Bu50^AOgUkd_varPi"
    "Hz(NBOj*<5ZQF1mFEeG8@ygNXlx#s$6;zSk&uh?JV{C$$m8DV%iKSWr$zXK4>DG@f`L$sDs3rC^deI`#r|Cq_HxIu|"
    "!;%ZW(8*b=MvsFW4sse>=2Xkq!ZIf&rx9r5p4Kz)N*NhO$#)|tDT=jgYa=kzZd=sGHmFYqvs%McSkCnTVd>0p49hX>"
    "y2G%h<FL4E_`jw&(X3i5Nir0j^W$<fYr(e?Ki^UWjTntKGr1H%CpduS06GwWrb@mx4hb!b<BOm#>~X*}-T!E@s!}#i"
    "GFGd4PeC%zVd@B!PKeu%n&`3UtC*EsuMNQXn2(*%r*b$)M(bF?URnbNB=Bk2qQSv~`-hSThVcIRDwL)QhM0p{FjrL("
    "?8}Ikqi#}GCxI-wGjPfbkjpj&!=?ikfz3stnCOA+P^vluwX2$BKryeGdz!4R8?uT<Y{EM+kL;9ccl8>`NvJ*%WV7WW"
    "T2JO8K+{yRnF~jgajeb|Poz2%2(6pVdrl0_fF6_b9fZZspjC<LI-+T+<}*VkWYaA^5mH7JDQBr2*2_gxG$Pr?AT5a2"
    "@2qIerd<Ni(4?#_!Qw#0T{&7=5h0j@nmlI**I1%r3H1cd!fcuJ4?B*_k|7e6u87n22(<g1nF~LDKL7X36+ytC9{jWw"
    "KjDm#PR0rc-bjxf-Mnf0CbK{|EOeP%Rr-PuE^m+1{7WPZk#LcOw>xNh$js{_>Cce*S-!L1J#qwdf58xKXSv%7!vd%E"
    "Na-UlPv9^^;{7DN-{Is#8zLQtmNOBAiUDWzG#;?skkIMS-yWjB{TrS7Z|Se#tG}GM{@V4I+OfrMR^Kd|Xi~dpPM#XW"
    "I!vwl;#OxncS!t$ZB|J2{GGg$?*WN-NzVR9I-PuJ5-)Urx#o}hEp~igG4C<q@plVbkW?@v!0~ONkXfRqBAc*7PPm%I"
    "jaAu=A3k*=B#;6OA0`DFW=PH5W)eCuwT+*O-+ZEl=Z(Z^h!LcnkEY}8I}SH6^_Yksg`~?uF9|&kKOOo(>&1v3hfgu%"
    "LQvT$=&y2H!HE+mPMkP#;>3v)Cr+HcyySOI&YsWIJ0}l6YlWj+r0bICIpZA?r{|4J<5bUl&a+Qg@k@2|agp%dJ{e4Z"
    "OWUpZ%^kt?w`Uj8V?LGZT7NSY{j})L4ksUd&Qm#ee#~~QbMg&Bgv2lHrFw1AB8lJLXN6SH??#<`%Oo!Bwt^uNjURII"
    "Wk`H>#0u$of8=#1Uz)@V7oF=Oz1_*jt}|-?|2gL56ONE}#-EfQ^R_RUsMEgi=VhE4u>(}^??zaCbFLquDRv-KX>Z~="
    "XFIbbz7*keREwzpXXUlh=VkbL7kysVQ3G$V_O~A180zPEgWDN5-iYjevUtPKPcFRZ<tP31SNMjr-<;OB{!)Efe!<B{"
    "?>i+Jzq!(L0@hE??snFDi^Si1fzMG8Kgr5#rGB#8<|jKz`H+nvL~hQ7Izkm+S}W{C8ihHZiR>hIIU>T=u(0(;rM<A3"
    "-_c=J7$zFn8G7_}Z_6~hs`CEPb6fxP;n8gBuf`jx_|NaXYw2-EMUR(XtX-atCcTI2uG62fdS>ZCC=_b4US;-rBeumg"
    "C69mn^3iYK{7d;azUOGnc|zU$&q<C`xu19A)cgBZ2dDP$Zw#m2IzVtWpGvO3LiPUsVzM?)rP%`vZVh^WpT((>xU-%#"
    "i5HT5j)LG+R$eQ`sa-al+SOA0uymju@WalH3#mVTb|Yo!Z&&qwf&Ibo>BEDy`T8mcV72+Ez3v<4_%xV)eLmO@`ZfNq"
    "pY6N0<>c>LCzqb#c96?wKiD_&)}Mdz&DP1K|4>`V<tMYLf4@DO^4rg_&ok@c!8<9wpW%4Wy`NbcS)KjN=cA47XJ%jV"
    "KHcK9KJ}OCQzlh=Khx}U_eUendi%abU|ovOQIP!%E3ankXS#*eJa;enSf<rIcfa&7_tJy^8Sh@(bU3xVZRbnuxqIg2"
    "VEdZ)4s+dIoqf#*W9@)bt8($isqFo?y65i4I8Nn$-tFf{$GveX{l6oR>*p!i-tRZ#Is9+%1poK$&3rK-=#~FYE7;PL"
    ")%&MSmJ`3v$*GZbR5{N)#@cO*ntPwKqk<p$n0wRg`wSIaz0Jv&CL7PfvGt9YSvfT0p2~(Ge)u%^!`yyU?MH-!_nG&Q"
    "{QM%-yP+oG$n+_)4o(Ndkq^&t{pI@WKJQ#S?TsUw`(Bgn`S&TtuQ7Ve$<GdWpBu+tCFdJLFgtKN<J?DZ;(iR%&2vsZ"
    "zk4t%^<%6Z=s&~YZ4xh?<8u@Q2ea~8DGu(n;oyxzE6?+8WxNr|+B(l$6c$p0y$dP&e=KQlZ@yZ)9QCh{UaQSV?Qr<~"
    "dhuhe(l6nBJLuORw*7kFPg8?;S|^vj*V{oZ9Sb*7Z)^VdJ=pis>)!tbeE-97kH`M!;*;I~_~G`4la1l_OF3u1IjwK~"
    "rTUZxwQ+m1?|Up?bk-Xd37!Xhj)LHJR$k4x?-3S)-}eYHI3o1ecp{VY_N=RW-=ph4y(8OSTXMZ$na&2o?YAM<*+y`C"
    "sA>9iH(%B8wTn-uul{Ys51X>TRZ!2jkH{RGa^LR8rq4^OgH3-}Yz&+JSK-){>#rM|KA3JTHvPWjtoK(Wes7x3Q4nm("
    "%BvZ_E%THoc3}B?%<ny6TGMD9jPR-A?J;k)g}gf*`dh`O4~oIC=~#*DY;9~BZW0zfd&L`zF0E;KZ2ItPBNN9%9a}oL"
    "kd$4*Cq`s&l&q}HHr@qu#6@U;956uavaTv@(f4~lzW31%LBOA<9YwL7uzuXqRnY6VAFBnGXWhR9IdQyugEd>7!tYV|"
    ">6<wAf3lY9L;"
)
_MODEL_LEGACY = (
    "c-rk<O>7j&6|S-Q8I0LA3k!yo!f2wEOyt;O1HmK?V}gxmH!L_Y*|1BX-JWUB^tz{e=pSPPUYtWD_7b5)%38@Dka7rz"
    "MB$KwFCip~qCG`>%5o%94xA!R2t|rWRdrQ&RZY*hZ4YJ~*Ar5^s$SRcd#}D%^``kGH+*JS+rc(~D47IXKnGyy1)<!J"
    "`7|w`AkPGO-X_m`Ei``{F6$)u9i;wLtDhbtFJAcm$Oz(oAyCkfF8|R9ByC2@jhq@o&x<6TA<xfSc)qe#&<y38rWZ@D"
    "1JhQ;)yw*I&1UjgdF@)J-Q7f9MY(PVIa1GSU@u65Y0Xw0Wk$0d-7;bRfkXno*%7pr<l5a9X5qYcFhu@N;`%1l{Iq5k"
    "maV6asi%eO*DhR-KOcF^oYIQ`_Y2gm@2!1deXU%59k@Q%R&`T1i?qt+>a$wH`nJ@u2bt|;JwZHsu+;58hoovqd%(!s"
    "qisCjlx{mNeCnpD+4x!UT*Xl5phf6|>1nNkih-eGHegzI89iOAq8Qo?)E(ZUP<hQA_Upe7s6Dtx`q2*cq!aipm}*(`"
    "Ely26NhCshz&v*`dX02^E0f+qbcv>uLVByfzfCCL&dkr~>GNlC4^p7oK0!Lt(|4?=&$lgsy+QM%nT};o8P>JXRs{9~"
    "(v5T;PN{=uApOl$`iy7hU1%CrBi)@!`^E$2-$+viQ*%)XwlC_Wf%072(_j{!N(ZJdiIu*C7V|7B7Al=o-F!)LN@@l1"
    "T{1nx=uY)thD-%_4(Fv|*H!mOKYG!rsJ4SLr&Pm1E!t|as1=wD+8`%A=vB16;6V}I`FhN{Ica%jK{263;qhFC?BbY)"
    ";lye+<_HUOjai}tyOD+h>*10#-jr}%d=nQS>zHNe`MFvRk;y^Bv9+S^xSFjMXa#6GQHf{jE*eKa{9A>qJENk>K<^v6"
    "si}BTJV#R|b=3(w3Oi*&g@U_?tE&dunxlH%!<0u1Vbri}%l(0=PeFYZ2H|LU?fgY2tDw%}87Fy`=L(ti2Z{!;#twg|"
    "*_Ok1w0@gpnjnK`s5WVp^dI*pvV^<^8*#9VxWY?O1y?=QboJ|a@syx@v>#QnS0%+a(yCpI)K5k6VUcev6h&O9nEL5g"
    "Qi2m@*>i}$O0_cZ-{tvvRKfH$(wiGF9id;}L8jpxlp3^DzQEQnNJO%lL)X+<9S!R1eemzHRn|<`E5mfA=fnw^qg5Q;"
    "z^a$&$z%{u9&%v8AYFFyDm#Kn%~jW1qKj&|yw*m~o7#%nEL$@Otd=#^T<_tMre~mvs%BnW=Yit|jx-VeGDO=I^iq_G"
    "@ZX6lapuf?$+k>b5xZg98de`ML&+O@r2?lVtbh~<GR;~Zs))^Cc&HVOG&t$9>P*u$m|yAUj*zHmZ|LmF&0TKpFLQIJ"
    "veyhMM$~-;Tl%<m)q}=EujyN0=dXG8^5%4CBHfv_04TrDrpUR$@f4jw38*BX+DL#3Thd8SHwucc^i{@$Kf53nvl(^-"
    "vOB#5%!N+<n(sWNPeQK$f5=5euQ`rWd~L6Zxh{8eP{FBv2op*J!%4<Ust@jhg8LzSUTj#7uhIOV--A2NIGj?rq$9R%"
    "*)=o_Z%B^Mr)ZQBCcHdVBF8H$)(q?{0aI|L)AJaQ!ItR(f4Gcg&9(JBli_o~>Z?j@&r~$EsM*FGix6B0Ba{kkP@C2A"
    "9_a>B?vHdA3P!o2b534(RmqG`K)R#DHOB803#i0^W&&T&*{Z7%_;SLh<Hx^obfEv(Kz}e4rJ&{2xo{Y0FCn`O-KGp{"
    "QZ<z70+chO8lDzrA<LwdRc1gir9@yWn2VO-nytH<GG$}%o@cs&mjlBqWeS=>i`{B%wV=cL6g8js%1~Xgj^T-B7LIK)"
    "gH%pKCc&BsQSH2cKf=f%y$7QA9<-d^8*LZ(>3vaB$fx&5JA``ZJyaWezY}pEwR4$!mi8L=GrNTMaC^PTM)~R20RO&U"
    "?wdE1ex2kWX2;zd0pWWE7#7^)`t)|(_mRTl`*oiVE&CpZOyCU=-ht6|V}=R#kmpXeJRBz2E4+`^k$wM7;eA}ryuVKv"
    "FX|&Zr2Qm+Z$vpeWt~DlFdu@8Bz-_wPh9R#0j7gNe1cC<|9d&*r}uG!ydgfQcQ&3=_M&u)yi=AWX|vJzx%0yb&=Txp"
    "l`VW6z#>U6ZR6wb?#%FfOC<ehc5}`njS~~+t9D!$h#l9pGgiDAh#ha%j`Le1<FG&vAIG^|99FIm02T*H+T3wi6c<f&"
    "N5^4NdCWD$Zfy_b?)hQf9;LoU;sd++em(!Tz;}}H4e|Ev(R(}}I7j%$gt*b~3Gt*Pog3%lRF^LCe2+;QT=5?R)c#Hh"
    "_LroWN_@Oy$>I6#ko0|Tb#_afuXa#k;z&CI@fd@Ew&mj4XuMbp>vtqWUxc-9yKo%|&K}Wz-6!_wi%dLwboYp~N75dJ"
    "_K3>U(+tl?T{`OeQ9T-3lRZiVa(BCj*H2N7B}G#LZ1v|XLDRmaO|(SY74g{$R~&KfP8}jHZ3^s9g8jFG^Oz(qZ)x!>"
    "OcDucO*}cu?-Z0?Euf|Noc8L;V10fne|P$&EV1;Huk8QRmuK?Xzqy}eGr#)lgMa+`>F<8}7w@;X!9w=<o`vim4*aI~"
    "7un<YTNZ9*KecDG6Hf{!|Mg$@!S%M&*~bSCoeYji{<CNB;0KEjrmy{d@X+>!>>r=q%8vf?m%Z2bp8Nf?k9!Ay_UF&O"
    "_3Y=f*?)gJo24<)ZC`$MP_BR^Ns=T<lGF^iva_zgx_TV>{AjcXdb`QyBl`Sri8w%uAfCV7F)aOU>2F7z{|SyXy+?1<"
    "`Co8uC7j>26Mt>B=T@zO{`+)@5pHzX`ZkkBbsT2WuY=m>ShJ^yUY(AoSDiVjS5mJ+y-Jbi(rKPAB2oe{+gxz2yt4C#"
    "@EmLG6yWL;<yca!{WaPSER6W+yQA^!K;>P2{UvQ~J3x<*ACB^TG&G2ht_spY=uzD7o``nf;s|dCL^+o9s{IadY$Ny`"
    "zFf5iy_|TbK0n2iOW&=}NA2V1XQf;<R<4p8Lax?tJ~}qYd_?>AizI%b#QFE2_IKALN&La!4=VLTW1_qff1yF`QoJn2"
    "-SFQxtM>1Ar?RAvL*VF6aP$Rn<f$Eqt0xb~d97X!rzd|X{dK7))#qTPah{L<&ZN=jU}D@^qvN-BGQy31W3hutzfs5E"
    "tz7WacixYuM-v}NJ(7A<9lv$|eNm5IZv0m60>7_`ax5t>4qvbMt<Gb-<)zeI@mu#ktj`~uyIz#C^lJROt_|(q&0bj<"
    "ZhffA{Z{U`)wnfvh3BKccWyLp6@LfuGI8sh0&d+~2e)=9WSnX|J?bn-J(7A<jay6V`r=lg@VHf!V@YentqH-tB-V^K"
    "GBxl<bK%wrEgo)7=A|sH1h*y{CPxEAj<#$_+?vsee-sn9E*f&bmHTZqZhchZ`RMm}8jV}U-{rOwJzFhqrCLj$?C)a_"
    "2)MPAj+dnO5iCp7`|IFZ@DaiHMm#-xN<I?PB}Go^83^MEhYX&N#vjp77{!f4O2x#rk92;Y6y;dbt3Edy+(7Y1;s0_s"
    "P>F|YAD8R%Q9GNvTAz>F(Tlc}t9WuXEaQ*3`8X@*gPV^F8~VJyi+ndr#$!oZ4IZOX|Ai;Yn@^37#}dCYv|jO8V{^P#"
    "FMB?4Q=Sh<J*hq)crF~PI>iEb8RrAy_YfO>uf_iVkZ%F<9axe+SkM2zPW+~uG5!CKd3-BrbL$cHUxse-eBw8S#cvT)"
    "{fhhft1AD0PVoN)IhGU`hx6YBZH0CL{oRoS!9HCdZ~v$U-oCpb=0p76?c@1)e*M6Ll%<u))oT5@LXCT@#ipK*{{gV4"
    "z^D"
)
_SUBCLASSED = (
    "c-rk;O-vI(6rR~qXo$v|NT>vGk5!3M@TZ0ZicqYGP!!FIKTr@-68^%ERxfg_o;-Nq;K3sY4;*_i;<4V)Q;&F(iwQ?>"
    "+GXFAouS=s%TihUzNC4X*|)R9n~$0Ay=?nB)ZKHux~`h2aJfhYaT7iM0JcZ?HoHCwmV%9gU6WWp-M!|4{*y4i=r?pH"
    "7*xIg2w>0Ia%$E^5aozaursV$1=<0yNs0G+7Fk$SZDe_APPJpRBa>4Li%abKQ?Qd0&v)%~<i&(~2jj0tcrGOlj=yf;"
    "ueXZlzs6sZlfMY$ub#hbAB#IhzG(<s^xV7s1KpHVW_I;>75^MYY`Ko-e@gI+HEDMBf@Zz!{%gFS7uumV%{D{-+b-TO"
    "0qs;!vwrAr9^m~HXvYTmxXBLQF9hwV^KjOWom=8_j=@euiIbd4&u%s{GoiLmQ@VSHJ2OWYH(!VDkD&(Vq_{r0_M=#%"
    "cphgTPh7_vT?2iTz(mFQrLnj?wrkloTLX41vNRqYnVnmhiA+zuj4Vyf&5rnV_pxyzU@L_Faj;IIpY6|;LjRbs9^n(X"
    "ryvjr1OkCTAP@)y0$~>U>h8@AL|45)lpDmlC95L_>Ucj^chA)04w;v%04d`VAuspnKvMO*AFDt6z_x&G1xp3Le9-FY"
    "G_xPB3w82U_`gWh;~E)()uY9D6<bfQ(H&9}+)s556e{7A(u|MZI?~tGD<|bMP^*?nt&7yYg6q!o;OccrlBo75Z9E5M"
    "Tab7{#%;0^D;?S=SHJ#~Z;bS3^Vg@JZErRj67?Hv-}*YfKY0H+`SnM;se21~4g!HdAP|V6q3PL*jCx5m8vC>SFLc(}"
    "kG*%GoHO=g`CIh7z2jIqz3H-r-Yi`_+!zlo9v)l7BVT=I)0h3PK$K^Fhn+i#3%sAzb;n%q*Lk2|G-{H+@k{*qhA40T"
    "vifAq$NL?2ebRlAAIA@E#fNKT1XiCE<5g^ZlIjjKhY3C4AVjdm>H%41Ge63DK+Hp8t>*HO&CBNUkgY4`@{paY|92i@"
    "9j}^f!K>26!;kUc;?ZrBcx3;cg!ny{e0p!C9rG2`d;9a1XxqQZSCSot<tzS9e%^@k<}c%ux7|2jVLT2TNcZjKD_`39"
    "akruEYR5G)ldp*JvLaup$f_H(jFw8gZjc21aPWF&SmqhY5IX|-ij?84H()MbS-Fl}Ekuu6R~L`U*%g{S^r-lK>3rw8"
    "`zGp9JkR&*(ci&;qeqqA!t`kJR`y*VQJ(yT&6^}b#(K0x(53zZ>d|lyKVA&lt07z?GkR2vmlb-{SyJ6FZwuX^@z#-<"
    "Wun)d9(CU~_GA06+>d(HT3*F$qDM;=j}=?%bMbeI^68uPA=KxnZ}#h()j{4b*Y7M9t8a4g*K-HP8#2e=go6A<{_f8&"
    "m7&AUFGYR6Gsx?6k;jO_@^ms>Se`!rkl()$<-HHE_uNJmb9uT|@45ZH$B!f5*K9z+H8PW@i}A7|Pp>4UeBUH4vzZ_L"
    "Jbmvyx6xs9d3xfJxja4j*w~Nl)2S!_cb;w?uin{$SEY-`2aE?7kB_#9$6rCo?-&"
)
_BFLOAT16 = (
    "c-rk+zi-n(6uz_L#H~OW38WGQWC}<b0HuVV6(T`2-~rJJ7_zl4O_fM#f)Wc+ri|e~VC=})F&m5>89R35zbHBTp5r@W"
    "H%j6G{J!P+?w;@Lci+8x_w29M+RO8c*+s&j>m)@C62vLTuT`-O?OR+@F8f@5SD>D{ZA-lVBJW?;d;hjlVcMq>V4M@p"
    "lR7~p5mx2-29s4@20k4rqTVOF(`B-0@7LHB@UlGRxRj^@e+|yxd`9HI$6pf4Uj*_u$Y1bdeNE<@hmARn`|i#98YPPF"
    ")%zK793Zxt6`#vgMLmm`>sm7B5B4qD4(GUMp+qB>hSqD@do@<RLaBR);oDFb?5PHfO(XV6d49t5zVY@!F4}KZmqowz"
    ">c#qNO8A4y&o@M?=C~5vEKL7yqtkT)dcd3Q-DcZ%RvxB8>fwH9Z?!vnOr}HhGa>bQNc}=cy-)WG=!*~t1OkCTAP@)y"
    "0+BqNm3J>(70=U%WI@hb=D93qMZKL`tIHB!+qUzezR9vWcC+!tb{g%L+YWi9!kl<%Tt{9aFGswD{PuB9)PwIqeja<q"
    "apiovd6x+Mws^T-5czp1<=y3cE$%zw`aZfL&MP9>>l?mf3`|iE_LCJNuCMY;>zn%P_E=iCpRe)tYvLS50lrJg_L}y4"
    "nHF%Sid&!d+9=GA7nx9n`Z`fk9d^bvFY`K$mleh9K<A88sc~yuq%nGrwEG@A&i=>R1n;2-x>9Fi>iB&Lo^r4ptq*?H"
    "xPx2`;&y5ENB>#xDZB2KdL^h2ULz0)1OkEhzwmcl>BWJR(i!8(B_2nn<{n3SJ#NHgkMaMT$$5^m&hrPwaZxlPsponB"
    "e^e<UJnwv6*ng0}?|bDfG8uoX{0~Ar_9K58;5&#_6!qkM)IBbXJ|9KB$<FnoeAG!n>__JV<%>8+QGk6*w%4@zs8nDx"
    "(_)Pqa<Rn?=@{b%kGCnGx7LGbeb^5U9!2YcA3uB?tp|Sk=M#)a$MedJjaQji<I%Y6aWgi1=>McW^0C=tAx3-r0Rz7i"
    "1p"
)
_BFLOAT16_LEGACY = (
    "c-rk;&2QT_6sH`=b@PQ3$bfcT2hYfg9J0ju*wQxL;&#sJ0YPJ|8BnYkJlbY#p|a%aBTZTu$T7R^nB$H;?%3OQ?4QtM"
    "jy>!T*exR|(h_OeQJXYKQ@*00NIsH}<a<9oJ~95iSomRd=+hxUD4hmLFb=|W$Y^_2%=7x+SgNsfkEJgXynK+>U1sIu"
    "tpCh_*l^>g)m4%?l&B*J>mUsjeT-CGy;CCTLs1>TtAxncv}(vGKSg@I;W{C`%)jHfmzciFdOZS)Ont||1lG#O$c9dN"
    "3)zltnYjFlrqPz;9U0Psouop_tkM4R>^V*QtHA1GWY&)CXDHN9LXc~e_T#Td)iO8rI-qiazWx1sA?R<QkNqB`{Cp;+"
    "{iZ(?_f65qZNEAGzDS9Do4W0|I5jQ1N%F4MDjR4E>#%6qTwkYR+HW!G=Nl<*zYV7MBiK$Z0|V|LyKKTHazI}@(X@`O"
    "h10>19g^o{D4*<W-ypVqr()p_h>bhM)bD-2zNP`zK<2}=Ff;e{%v><fA(pzxbS!(*u$~53(ZLT)&$CqnIu2dY?5#}p"
    "0ea#g)77Dooz7%^Ji_JAvz)<1E~#;CsGG22kTTcy5H6~@J1s<cu?l#!CQGMHdlE(|Y+%-sW$4wN9>Y|y$k3hpCfmmK"
    "Hmd86i)>WmJ(!+hkQ%BE4lZ~kPvl3l<+*F5S{k7O-D;!kG$0lB5$S0<GyiL70$Dot!aQl{w4m*f!cAy6WR^Cp*HJB0"
    "zz5XHfMs7lX;Z7^;=RTT$#~mXU|Grn-X7Fr38;ykp|$o*-6cyskDp=H)wdv-AL+o*O$6yWdk!jBbm#<<VyR4w2Rd$y"
    "l}dkx_aj2=nNWSi9PSyGZMi?2`X+`OX%-Hm+u`pc+Xc9doS@9|T&b}CM9Bn>Dey1Iwj5E={$sLb!VI1PZ8j>CpUM+i"
    "!&>1%9I7O))F`Uri3hQLKckyh?ubX_h)~eG#9Hp-RVP#RH@pWfu$?(0$_lr2ve{qF;pe8+#E|ASaXvS5^Cm7qEk`$~"
    "?&fB4Il@!L9CT%w%uW@Cr%*vIJZ+Vz!)EiigRYzCt;TFxTe?{<HxV>Xd%A4sEv)0vtfEt%INjh#8}qjz+Av9@C>!(J"
    "MAbMuX0>5kChjQw60s4rAGx4hHS|^sFH6t?tB`cM-6k)vil-a3vJZh>FSvG_`#9m0`)`9`|0v|&rH=3?F7)t2`1yZ~"
    "kAvJ<+UG0*CIBvW&M9)ek7<0oiBLU}bvC4-q<mO9XUcqBokm#wsLV(9FjPJ!*VC;G{M6l)IwL4jq)3sX)1wFX*9#hr"
    "O0aldQj7!0aT7(+q=A9RIBDsc_+8|vIO%>yedkbd(jZRC{n)>*ihS6Q6z%jxaA2ULcf~6r4zyVQkE^0wr8$vro8|Wx"
    "ME|*TSK?#&{lfX$KOS$E*DHuOkJ5OvAIA;?&TkuU9uI-UMSi|W2iT#}f5G~5xxnWP=QHu}=+8-oM+%R+@hG2({%&)!"
    "cog_0udj*tA?vZCUVce54y3bwerhrv4*Yjr;ef({?)w+TNs-TwvH{>n<Bos-LdJoEFGL)W^;l6a9PsaP@P*UZmvb!<"
    "?O(_#@eB#)C#-Cc<r4|NgEZ5K0WCijjTC!l@Z6gS-e<Y~{CqZVzErvtrs<VifA4*_dz(D(uI#Sx^6;}FMT!(DQl#j-"
    "`<1>Q*eh-o-;XRZKQbwexPQjiBl<hQ_@bYG0pgvvx0lp;Tb;MN<8Ch(M81>$4#49>avXnzo!{Oyel6b*3dgHQ*?*oV"
    "cWNd=`5|skEI$l-$F&Zaoq?rzcDB2$>`d8Nx1D8{Bs*jG+1^)t`{g1K>{!-gMZMm)(Kztt2D9tscsTI-TR)vrOR8`H"
    "6H^~BwJh@SYn$wPCy=g<0_l2a$DT7Wap0dDA`ZxUtmw4QA!{GxImFki;IFweM?_<}{=K^0pO52gF5jPz<7obl(yM5_"
    "Dt(~m+xN8|8)`j-^>}!`;vekyBN{^d1N8pA2Sv&s3;AQ6b5cRpH=jx;G;SyUA>B_De^;S9{&5MvV0{_$U~w2M9<o1("
    "<~ShJ{~C--Q~"
)


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


MODEL_KERAS = _unpacked(_MODEL_KERAS)
MODEL_LEGACY = _unpacked(_MODEL_LEGACY)
SUBCLASSED = _unpacked(_SUBCLASSED)
BFLOAT16 = _unpacked(_BFLOAT16)
BFLOAT16_LEGACY = _unpacked(_BFLOAT16_LEGACY)


def put(path: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(data)
    return path


def make(path: Path, fill: Callable[[h5py.File], Any], **options: Any) -> Path:
    """Make an HDF5 file with h5py."""
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path


def read(path: Path, known: dict[Any, Any] | None = None) -> Checkpoint:
    """Read a checkpoint as its suffix says."""
    row = hdf5.read_keras if path.suffix == hdf5.KERAS_SUFFIX else hdf5.read
    return row(os.fspath(path), {} if known is None else known)


def spilled(checkpoint: Checkpoint, folder: Path) -> Path:
    """Return a file with the bytes of all tensors that spill."""
    path = folder / "spilled"
    path.write_bytes(bytes(checkpoint.files[1].size))
    names = [t.name for t in checkpoint.index.tensors if t.extent.file == 1]
    row = hdf5.spill_keras if checkpoint.index.format == hdf5.KERAS else hdf5.spill
    row(checkpoint, names, os.fspath(path))
    return path


def payload(checkpoint: Checkpoint, folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor, as an engine would read them."""
    paths = [checkpoint.files[0].path]
    if len(checkpoint.files) > 1:
        paths.append(os.fspath(spilled(checkpoint, folder)))
    files = [Path(path).read_bytes() for path in paths]
    return {
        t.name: files[t.extent.file][t.extent.offset : t.extent.offset + t.extent.nbytes]
        for t in checkpoint.index.tensors
    }


def build(draft: Draft, data: Mapping[str, bytes], path: Path, seal: Any = None) -> Path:
    """Write what a draft says, as an engine would."""
    [file] = draft.files
    raw = bytearray(Path(file.copy_of).read_bytes() if file.copy_of else file.nbytes)
    assert len(raw) == file.nbytes
    for offset, literal in file.literals:
        raw[offset : offset + len(literal)] = literal
    for name, place in draft.places.items():
        if name in data and place.extent.nbytes:
            _, offset, n_bytes = place.extent
            assert len(data[name]) == n_bytes
            raw[offset : offset + n_bytes] = data[name]
    if seal is not None:
        sums = {e: zlib.crc32(raw[e.offset : e.offset + e.nbytes]) for e in draft.sums}
        for patch in seal(SimpleNamespace(sums=draft.sums, own=draft.own), sums):
            raw[patch.offset : patch.offset + len(patch.data)] = patch.data
    path.write_bytes(raw)
    return path


def copies(checkpoint: Checkpoint) -> list[Entry]:
    """Return an entry for each tensor under its own name."""
    return [entry_of(t.name, t, COPY) for t in checkpoint.index.tensors]


def foreign(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    """Return a checkpoint of another format with these (dtype, shape) tensors."""
    found, end = [], 0
    for name, (dtype, shape) in tensors.items():
        tensor = Tensor(name, DTYPES[dtype], shape, Extent(0, end, 0))
        found.append(tensor._replace(extent=Extent(0, end, tensor.nbytes)))
        end += tensor.nbytes
    index = Index("safetensors", tuple(found), ("",))
    return Checkpoint("other.safetensors", (Stamp("other.safetensors", end, 0, 0),), index, ("",))


def value(array: Any) -> np.ndarray:
    """Return an array in little-endian order."""
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.kind != "V" else array


def written(
    entries: list[Entry], last: Checkpoint, path: Path, data: dict[str, bytes]
) -> tuple[Draft, Checkpoint]:
    """Write entries with the bytes of their sources to a new file; return what it reads as."""
    keras = path.suffix == hdf5.KERAS_SUFFIX
    draft = (hdf5.fresh_keras if keras else hdf5.fresh)(entries, last, None)
    made = {entry.name: data[entry.source] for entry in entries}
    build(draft, made, path, hdf5.seal_keras if keras else None)
    checkpoint = read(path)
    assert {t.name: (t.dtype, t.shape) for t in checkpoint.index.tensors} == {
        e.name: (e.dtype, e.shape) for e in entries
    }
    assert payload(checkpoint, path.parent) == made
    return draft, checkpoint


def attributes(path: Path) -> dict[str, dict[str, object]]:
    """Return every attribute of a file but the lists of names."""
    found: dict[str, dict[str, object]] = {}

    def visit(name: str, thing: h5py.Group | h5py.Dataset) -> None:
        own = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in thing.attrs.items()}
        found[name] = {k: v for k, v in own.items() if not k.endswith("_names")}

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found
